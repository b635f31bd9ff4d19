//! Problems of one Service and its slices, while it is being resolved.

use k8s_openapi::api::discovery::v1::EndpointSlice;
use sluice_dataplane::table::ServiceName;

use crate::object::name_of;
use crate::problem::Problem;

/// Collects problems. Costs nothing while there are none.
pub(super) struct Problems<'n> {
    service: &'n ServiceName,
    list: Vec<Problem>,
}

impl<'n> Problems<'n> {
    pub(super) fn new(service: &'n ServiceName) -> Self {
        Self { service, list: Vec::new() }
    }

    /// Something that the Service asks for is not served.
    pub(super) fn error(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.list.push(Problem::error(field, message).about(format!("Service {}", self.service)));
    }

    /// The Service is served, but probably not as meant.
    pub(super) fn warning(&mut self, field: impl Into<String>, message: impl Into<String>) {
        self.list.push(Problem::warning(field, message).about(format!("Service {}", self.service)));
    }

    /// Something of a slice is not used.
    pub(super) fn slice_error(&mut self, slice: &EndpointSlice, field: impl Into<String>, message: impl Into<String>) {
        self.list.push(Problem::error(field, message).about(slice_name(slice)));
    }

    /// A slice is used, but probably not as meant.
    pub(super) fn slice_warning(
        &mut self,
        slice: &EndpointSlice,
        field: impl Into<String>,
        message: impl Into<String>,
    ) {
        self.list.push(Problem::warning(field, message).about(slice_name(slice)));
    }

    /// All, sorted, each once: families and ports may have met the same one.
    pub(super) fn into_list(mut self) -> Vec<Problem> {
        self.list.sort();
        self.list.dedup();
        self.list
    }
}

fn slice_name(slice: &EndpointSlice) -> String {
    format!("EndpointSlice {}", name_of(&slice.metadata))
}
