//! A file or folder of manifests: what has changed since the last look.
