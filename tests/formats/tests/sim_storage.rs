//! The simulated storage itself.

use std::collections::BTreeSet;
use std::io;

use formats::Storage;
use formats_tests::{CrashExplorer, CrashKind, Fault, SimStorage};

fn sector(value: u8) -> Vec<u8> {
    vec![value; 512]
}

#[test]
fn unsynced_sectors_survive_a_power_cut_in_every_combination() {
    let sim = SimStorage::new();
    sim.set_len(2048).unwrap();
    sim.forget_trace();
    sim.write_at(&[sector(1), sector(2)].concat(), 0).unwrap();
    sim.write_at(&sector(3), 1024).unwrap();
    let mut found = BTreeSet::new();
    let count = CrashExplorer { from: 2, ..Default::default() }.explore(&sim, |state| {
        let mut buf = vec![0; 2048];
        state.storage.read_at(&mut buf, 0).unwrap();
        if state.kind == CrashKind::PowerCut {
            found.insert([buf[0], buf[512], buf[1024]]);
        }
    });
    assert_eq!(found.len(), 8, "{found:?}");
    assert_eq!(count.points, 1);
}

#[test]
fn synced_sectors_are_always_there() {
    let sim = SimStorage::new();
    sim.write_at(&sector(7), 0).unwrap();
    sim.sync().unwrap();
    sim.write_at(&sector(8), 512).unwrap();
    CrashExplorer { from: 2, ..Default::default() }.explore(&sim, |state| {
        let mut buf = [0; 512];
        state.storage.read_at(&mut buf, 0).unwrap();
        assert_eq!(buf[..], sector(7));
    });
}

#[test]
fn a_lost_extension_takes_the_sectors_beyond_with_it() {
    let sim = SimStorage::new();
    sim.set_len(512).unwrap();
    sim.forget_trace();
    sim.set_len(1024).unwrap();
    sim.write_at(&sector(9), 512).unwrap();
    let mut lengths = BTreeSet::new();
    CrashExplorer::default().explore(&sim, |state| {
        let len = state.storage.len().unwrap();
        assert!(len == 512 || len == 1024);
        lengths.insert(len);
    });
    assert_eq!(lengths.len(), 2);
}

#[test]
fn a_write_that_extends_the_file_extends_it_as_far_as_its_kept_sectors() {
    let sim = SimStorage::new();
    sim.write_at(&[sector(1), sector(2), sector(3)].concat(), 0).unwrap();
    let mut lengths = BTreeSet::new();
    CrashExplorer::default().explore(&sim, |state| {
        lengths.insert(state.storage.len().unwrap());
    });
    assert_eq!(lengths, BTreeSet::from([0, 512, 1024, 1536]));
}

#[test]
fn faults_hit_the_operation_they_were_meant_for() {
    let sim = SimStorage::new();
    sim.inject(Fault { after: 1, lasting: false, error: io::ErrorKind::Other, partial: false });
    sim.write_at(&sector(1), 0).unwrap();
    assert_eq!(sim.sync().unwrap_err().kind(), io::ErrorKind::Other);
    sim.sync().unwrap();
    sim.limit_len(Some(1024));
    assert_eq!(sim.set_len(1025).unwrap_err().kind(), io::ErrorKind::StorageFull);
    sim.set_len(1024).unwrap();
}

#[test]
fn holes_are_reported() {
    let sim = SimStorage::new();
    sim.set_len(1 << 20).unwrap();
    sim.write_at(&sector(1), 8192).unwrap();
    sim.write_at(&sector(0), 65536).unwrap();
    assert_eq!(sim.next_data(0).unwrap(), Some((8192, 12288)));
    assert_eq!(sim.next_data(9000).unwrap(), Some((9000, 12288)));
    assert_eq!(sim.next_data(12288).unwrap(), None);
    sim.punch(8192, 4096).unwrap();
    assert_eq!(sim.next_data(0).unwrap(), None);
}
