//! What a backend offers, and whether it is enough for a guest that knows another one.

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_blk::*;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Bytes of the configuration space of a block device (virtio 1.2, 5.2.4), without what zoned devices add.
pub const CONFIG_BYTES: usize = 60;
/// Offset of `writeback` in it.
pub const CONFIG_WCE: usize = 32;
/// Offset of `num_queues` in it.
const CONFIG_QUEUES: usize = 34;

/// Features that a guest may be offered, if the backend has them.
pub const KNOWN_FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_BLK_F_SIZE_MAX
    | 1 << VIRTIO_BLK_F_SEG_MAX
    | 1 << VIRTIO_BLK_F_RO
    | 1 << VIRTIO_BLK_F_BLK_SIZE
    | 1 << VIRTIO_BLK_F_FLUSH
    | 1 << VIRTIO_BLK_F_TOPOLOGY
    | 1 << VIRTIO_BLK_F_CONFIG_WCE
    | 1 << VIRTIO_BLK_F_MQ
    | 1 << VIRTIO_BLK_F_DISCARD
    | 1 << VIRTIO_BLK_F_WRITE_ZEROES;

/// What a backend offers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// Virtio features, of those that are known here.
    pub features: u64,
    /// Queues.
    pub queues: u16,
    /// The configuration space: its first 60 bytes.
    pub config: Vec<u8>,
}

/// Numbers of the configuration space that limit what a driver may ask for: name, offset, the feature that makes them valid.
/// A device must not go below what its driver has read.
const LIMITS: [(&str, usize, u32); 6] = [
    ("the most bytes of a segment", 8, VIRTIO_BLK_F_SIZE_MAX),
    ("the most segments of a request", 12, VIRTIO_BLK_F_SEG_MAX),
    ("the most sectors of a discard", 36, VIRTIO_BLK_F_DISCARD),
    ("the most segments of a discard", 40, VIRTIO_BLK_F_DISCARD),
    ("the most sectors of a write-zeroes", 48, VIRTIO_BLK_F_WRITE_ZEROES),
    ("the most segments of a write-zeroes", 52, VIRTIO_BLK_F_WRITE_ZEROES),
];

impl Offer {
    fn u32_at(&self, offset: usize) -> u32 {
        let bytes = self.config.get(offset..offset + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_le_bytes)
    }

    /// Sectors of 512 bytes.
    pub fn capacity(&self) -> u64 {
        u64::from(self.u32_at(0)) | u64::from(self.u32_at(4)) << 32
    }

    /// Whether the write cache is on.
    pub fn wce(&self) -> u8 {
        self.config.get(CONFIG_WCE).copied().unwrap_or(0)
    }

    /// The same with the write cache on or off.
    pub fn set_wce(&mut self, wce: u8) {
        if let Some(byte) = self.config.get_mut(CONFIG_WCE) {
            *byte = wce;
        }
    }

    /// The same for a device with `queues` queues: the driver is not told of more.
    pub fn with_queues(mut self, queues: u16) -> Self {
        if let Some(bytes) = self.config.get_mut(CONFIG_QUEUES..CONFIG_QUEUES + 2) {
            bytes.copy_from_slice(&queues.to_le_bytes());
        }
        self
    }

    /// Whether a driver that chose `features` of this offer, and read its configuration, can go on with `new`.
    ///
    /// # Errors
    /// A sentence that says what is worse.
    pub fn can_become(&self, new: &Offer, features: u64, queues: u16) -> Result<()> {
        let missing = features & KNOWN_FEATURES & !new.features;
        ensure!(missing == 0, "it lacks the features {missing:#x} that the guest uses");
        ensure!(new.queues >= queues, "it has {} queues and the guest's device has {queues}", new.queues);
        let (had, has) = (self.capacity(), new.capacity());
        ensure!(has >= had, "its disk has {has} sectors and the guest knows one of {had}");
        for (what, offset, feature) in LIMITS {
            let (had, has) = (self.u32_at(offset), new.u32_at(offset));
            ensure!(
                features >> feature & 1 == 0 || has >= had,
                "{what} is {has} there and the guest was told {had}"
            );
        }
        let (had, has) = (self.u32_at(20), new.u32_at(20));
        ensure!(
            features >> VIRTIO_BLK_F_BLK_SIZE & 1 == 0 || had == has,
            "its sectors have {has} bytes and the guest knows {had}"
        );
        let read_only = new.features >> VIRTIO_BLK_F_RO & 1 == 1 && features >> VIRTIO_BLK_F_RO & 1 == 0;
        ensure!(!read_only || self.features >> VIRTIO_BLK_F_RO & 1 == 1, "its disk is read-only");
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offer(features: u64, capacity: u64) -> Offer {
        let mut config = vec![0; CONFIG_BYTES];
        config[..8].copy_from_slice(&capacity.to_le_bytes());
        config[12..16].copy_from_slice(&126u32.to_le_bytes());
        config[20..24].copy_from_slice(&512u32.to_le_bytes());
        Offer { features, queues: 2, config }
    }

    const ALL: u64 = KNOWN_FEATURES & !(1 << VIRTIO_BLK_F_RO);

    #[test]
    fn a_backend_that_is_as_good_or_better_will_do() {
        let known = offer(ALL, 100);
        known.can_become(&known, ALL, 2).unwrap();
        known.can_become(&offer(ALL, 101), ALL, 2).unwrap();
        known.can_become(&offer(1 << 32, 100), 1 << 32, 2).unwrap();
    }

    #[test]
    fn whatever_got_worse_is_named() {
        let known = offer(ALL, 100);
        let why = |new: &Offer| known.can_become(new, ALL, 2).unwrap_err().to_string();
        assert!(why(&offer(ALL & !(1 << VIRTIO_BLK_F_FLUSH), 100)).contains("features 0x200"));
        assert!(why(&offer(ALL, 99)).contains("99 sectors"));
        assert!(why(&Offer { queues: 1, ..known.clone() }).contains("1 queues"));
        assert!(why(&offer(KNOWN_FEATURES, 100)).contains("read-only"));
        let mut fewer = known.clone();
        fewer.config[12] = 16;
        assert!(why(&fewer).contains("segments of a request is 16"));
        let mut larger = known.clone();
        larger.config[21] = 16;
        assert!(why(&larger).contains("4608 bytes") || why(&larger).contains("4096 bytes"));
    }
}
