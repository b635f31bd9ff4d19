//! What is wrong with an object: said in words that name file, document, object and field.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

/// Where an object comes from.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase", tag = "from")]
pub enum Origin {
    /// A document of a file.
    File {
        /// The file.
        path: Arc<Path>,
        /// Number of the document in it, from 1; 0 is the whole file.
        document: usize,
    },
    /// Made up by the controllers' part that the folder source plays.
    LocalController,
    /// The Kubernetes API.
    Api,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { path, document: 0 } => write!(f, "{}", path.display()),
            Self::File { path, document } => write!(f, "{}, document {document}", path.display()),
            Self::LocalController => f.write_str("made up by local controllers"),
            Self::Api => f.write_str("the Kubernetes API"),
        }
    }
}

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// Something that was asked for is not served.
    Error,
    /// Everything is served, but probably not as meant.
    Warning,
}

/// What kind of thing is wrong, as Events name it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
pub enum Reason {
    /// An object says what cannot be, or cannot be served.
    #[default]
    InvalidObject,
    /// Two Services want one address and port.
    AddressConflict,
    /// The port that load balancers ask cannot be had; kube-proxy's word.
    FailedToStartServiceHealthcheck,
}

impl Reason {
    /// The word.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::InvalidObject => "InvalidObject",
            Self::AddressConflict => "AddressConflict",
            Self::FailedToStartServiceHealthcheck => "FailedToStartServiceHealthcheck",
        }
    }
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// Where the object comes from, when that is known.
    pub origin: Option<Origin>,
    /// The object as `Kind namespace/name`, when it is known.
    pub object: Option<String>,
    /// The field, as a path such as `spec.ports[0].port`; empty when it is about the whole.
    pub field: String,
    /// What is wrong and, where there is one, the way out.
    pub message: String,
    /// What kind of thing is wrong.
    pub reason: Reason,
}

impl Problem {
    /// A problem without origin or object, to be completed with [`Problem::about`] and [`Problem::from`].
    #[must_use]
    pub fn new(severity: Severity, field: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            severity,
            origin: None,
            object: None,
            field: field.into(),
            message: message.into(),
            reason: Reason::default(),
        }
    }

    /// An error.
    #[must_use]
    pub fn error(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Severity::Error, field, message)
    }

    /// A warning.
    #[must_use]
    pub fn warning(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::new(Severity::Warning, field, message)
    }

    /// With the object it is about, as `Kind namespace/name`.
    #[must_use]
    pub fn about(mut self, object: impl Into<String>) -> Self {
        self.object = Some(object.into());
        self
    }

    /// With its kind.
    #[must_use]
    pub fn because(mut self, reason: Reason) -> Self {
        self.reason = reason;
        self
    }

    /// With the place the object comes from.
    #[must_use]
    pub fn from(mut self, origin: &Origin) -> Self {
        self.origin = Some(origin.clone());
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        if let Some(object) = &self.object {
            write!(f, "{object}: ")?;
        }
        if !self.field.is_empty() {
            write!(f, "{}: ", self.field)?;
        }
        f.write_str(&self.message)
    }
}
