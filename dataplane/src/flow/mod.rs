//! The flow table: every connection and conversation that is balanced now, found by the packets of either direction.

mod drain;
mod index;
mod key;
mod life;
mod offloaded;
mod record;
mod recover;
mod room;
mod state;
mod store;
mod table;
mod view;

pub use drain::{Ended, Progress, Reset};
pub(crate) use index::MAX_RECORDS;
pub use key::{Address, FlowKey};
pub(crate) use record::Record;
pub use record::{FlowFields, Source};
pub use state::{State, Timeouts};
pub use store::{FlowFile, FlowFileError, Found, Recovery};
pub(crate) use store::{Header, Hold, Store};
pub use table::{FlowTable, Full, Hit, MEMORY_PER_FLOW, Masquerade, NewFlowRecord, OpeningProgress, SourceChoice};
pub use view::FlowView;

#[cfg(test)]
mod tests;
