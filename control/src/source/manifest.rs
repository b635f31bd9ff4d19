//! Text to objects, with errors that name file, document, object and field.
