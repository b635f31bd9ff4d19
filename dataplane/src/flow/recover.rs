//! Which flows of the last process go on: the index is built again from the records, and what is not whole is dropped.

use std::sync::atomic::Ordering::Relaxed;

use super::index::Entry;
use super::record::Source;
use super::table::{FlowTable, Hit};
use crate::net::{Direction, Protocol};

impl FlowTable {
    /// Takes in the records that lie in memory. Nobody else may have the table yet. Returns how many flows go on, and how
    /// many records were dropped.
    pub(super) fn recover(&self) -> (usize, usize) {
        let mut writer = self.lock();
        let used = (self.header[0].records_used.load(Relaxed) as usize).min(self.records.len());
        writer.used = used as u32;
        let (mut flows, mut dropped) = (0, 0);
        for number in (0..used as u32).rev() {
            let record = &self.records[number as usize];
            if record.is_live() {
                if let Some(hit) = self.hit(number).filter(|hit| record.is_whole() && self.makes_sense(hit)) {
                    self.adopt(&hit);
                    flows += 1;
                    continue;
                }
                record.forget();
                dropped += 1;
            }
            writer.free.push(number);
        }
        writer.live = flows as u32;
        (flows, dropped)
    }

    /// Whether what the record names exists, and no other flow has its packets.
    fn makes_sense(&self, hit: &Hit) -> bool {
        let fields = hit.fields();
        let source_exists = match fields.source {
            Source::Preserved => true,
            Source::Masqueraded { address, .. } => usize::from(address) < self.masquerade().len(),
        };
        let is_tcp = fields.request.protocol == Protocol::Tcp;
        source_exists
            && is_tcp != hit.state().is_of_datagrams()
            && self.slots().exists(fields.endpoint_slot, fields.port_slot)
            && self.probe(&fields.request).is_none()
            && self.probe(&fields.reply(self.masquerade())).is_none()
    }

    fn adopt(&self, hit: &Hit) {
        for direction in [Direction::Request, Direction::Reply] {
            let hash = self.hash(&hit.fields().key(direction, self.masquerade()));
            self.index.insert(hash, Entry { record: hit.record, direction });
        }
        self.slots().flow_opened(hit.fields().endpoint_slot);
        if hit.state().is_finished() {
            self.slots().flow_finished(hit.fields().endpoint_slot);
        }
    }
}
