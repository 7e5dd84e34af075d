//! The journal's file: appends that fail are reported as failed, and may be there all the same, or in part.

use mirror::{Record, Recovery, Tail, decode_all, encode, recover};

use crate::dice::Dice;

/// The bytes of a journal.
#[derive(Debug, Default)]
pub(crate) struct JournalFile {
    bytes: Vec<u8>,
    /// Where the next append goes.
    end: usize,
}

impl JournalFile {
    pub(crate) fn append(&mut self, record: &Record) {
        self.bytes.truncate(self.end);
        self.bytes.extend(encode(record));
        self.end = self.bytes.len();
    }

    /// The append failed, or the daemon died in it: any part of it may be there.
    pub(crate) fn tear(&mut self, record: &Record, dice: &mut Dice) {
        self.bytes.truncate(self.end);
        let line = encode(record);
        let kept = match dice.below(3) {
            0 => 0,
            1 => line.len(),
            _ => dice.below(line.len() as u32 + 1) as usize,
        };
        self.bytes.extend(&line[..kept]);
    }

    pub(crate) fn recover(&self) -> (Vec<Record>, Recovery) {
        let (records, tail) = decode_all(&self.bytes).expect("a journal is only ever torn at its end");
        assert!(tail == Tail::Whole || self.bytes.len() > self.end, "a whole append is read as torn");
        let recovery = recover(&records).expect("a machine's records do not contradict each other");
        (records, recovery)
    }
}
