//! Room for a new flow: a record, and a source port that its endpoint can tell it by.
//!
//! Full table: an expired, closing or long unanswered flow near the sweep's hand makes room; when there is none the new
//! flow is refused. An established flow is never pushed out.

use std::sync::atomic::Ordering::Relaxed;

use super::State;
use super::record::{FlowFields, Source};
use super::table::{FlowTable, Full, Hit, Writer};

/// Milliseconds after which nothing of a finished flow is under way any more, as a rule.
const PORT_REST_MS: u32 = 1_000;
/// Ports of finished flows that are looked at for one that rested so long. They come in turn, so the first are the most rested.
const PORT_SEARCH: u32 = 2;
/// Records looked at for a victim when the table is full.
const VICTIM_SEARCH: usize = 64;
/// Unanswered opens idle for this many milliseconds may be pushed out of a full table.
const UNANSWERED_VICTIM_MS: u32 = 5_000;

impl FlowTable {
    pub(super) fn take_record(&self, writer: &mut Writer, now_ms: u32) -> Result<u32, Full> {
        if let Some(record) = writer.free.pop() {
            return Ok(record);
        }
        let used = writer.used as usize;
        if used < self.records.len() && self.records.reserve(used + 1).is_ok() {
            writer.used += 1;
            // Before the record is published, so that the next process finds it.
            self.header[0].records_used.store(writer.used, Relaxed);
            return Ok(writer.used - 1);
        }
        if used == 0 {
            return Err(Full::Table);
        }
        for _ in 0..VICTIM_SEARCH {
            writer.hand = (writer.hand + 1) % writer.used;
            if let Some(hit) = self.hit(writer.hand).inspect(|hit| self.caught_up(writer, hit))
                && self.may_push_out(&hit, now_ms)
            {
                self.end(writer, &hit);
                self.evictions.fetch_add(1, Relaxed);
                return writer.free.pop().ok_or(Full::Table);
            }
        }
        Err(Full::Table)
    }

    fn may_push_out(&self, hit: &Hit, now_ms: u32) -> bool {
        let idle = self.records[hit.record as usize].idle_ms(now_ms);
        match hit.state() {
            State::Closing | State::Reset => true,
            State::Opening | State::Unreplied => idle > UNANSWERED_VICTIM_MS,
            State::Established | State::HalfClosedByClient | State::HalfClosedByEndpoint | State::Replied => {
                self.is_expired(hit, now_ms)
            }
        }
    }

    /// The first port of the reserved range towards the endpoint that is free, or whose flow finished long enough ago; in
    /// turn, so that a port rests as long as possible before it is used again. Where there is none, that of the flow that
    /// finished longest ago.
    pub(super) fn choose_port(
        &self,
        writer: &mut Writer,
        fields: FlowFields,
        address: u8,
        now_ms: u32,
    ) -> Result<Source, Full> {
        let (first, last) = (u32::from(*self.ports.start()), u32::from(*self.ports.end()));
        let count = last - first + 1;
        // Several Service ports may have this endpoint, each with a turn of its own: they begin apart.
        let begin = fields.endpoint_slot.0.wrapping_mul(0x9e37_79b9);
        let mut finished: Option<(Source, Hit, u32)> = None;
        let mut left = PORT_SEARCH;
        for _ in 0..count {
            let turn = self.slots.next_source_port(fields.endpoint_slot).wrapping_add(begin) % count;
            let source = Source::Masqueraded { address, port: (first + turn) as u16 };
            let Some(other) = self.probe(&FlowFields { source, ..fields }.reply(self.masquerade())) else {
                return Ok(source);
            };
            self.absorb(writer, other.record, &other.snapshot);
            let idle = self.records[other.record as usize].idle_ms(now_ms);
            // Stamped after `now_ms` was read: not idle at all.
            let idle = if idle > u32::MAX / 2 { 0 } else { idle };
            if !other.state().is_finished() {
                continue;
            }
            left -= 1;
            if finished.as_ref().is_none_or(|(.., longest)| idle > *longest) {
                finished = Some((source, other, idle));
            }
            if idle >= PORT_REST_MS || left == 0 {
                break;
            }
        }
        let (source, other, _) = finished.ok_or(Full::Ports)?;
        self.end(writer, &other);
        Ok(source)
    }
}
