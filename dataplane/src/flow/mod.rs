//! The flow table: every connection and conversation that is balanced now, found by the packets of either direction.

mod drain;
mod index;
mod key;
mod record;
mod state;
mod table;
mod view;

pub use drain::{Ended, Progress, Reset};
pub use key::{Address, FlowKey};
pub(crate) use record::Record;
pub use record::{FlowFields, Source};
pub use state::{State, Timeouts};
pub use table::{FlowTable, Full, Hit, MEMORY_PER_FLOW, NewFlowRecord, OpeningProgress, SourceChoice};
pub use view::FlowView;
