//! Single rules, one test each; interleavings are the simulator's business (`tests/mirror`).

use super::*;
use crate::{
    CopyResult, OnTargetError, PauseReason, Plan, Recovery, Side, SwitchMode, Verify, VerifyResult,
    WriteKind, WriteTo, recover,
};

const EXTENT: u64 = 64 << 10;

/// A machine, what it asked for last, and what it ever recorded.
struct Bench {
    machine: Machine,
    now: Tick,
    records: Vec<Record>,
}

fn config(extents: u64) -> Config {
    Config { disk_size: extents * EXTENT, verify: Verify::None, copy_bytes_max: EXTENT, ..Config::default() }
}

impl Bench {
    fn new(config: Config) -> Self {
        Self { machine: Machine::new(config), now: Tick(1_000), records: Vec::new() }
    }

    fn apply(&mut self, event: Event) -> Vec<Action> {
        let mut actions = Vec::new();
        self.machine.apply(self.now, event, &mut actions);
        for action in &actions {
            if let Action::Record(record) = action {
                self.records.push(record.clone());
            }
        }
        actions.retain(|action| !matches!(action, Action::StateChanged(_)));
        actions
    }

    /// Applies the event, and confirms the record that it led to.
    fn apply_recording(&mut self, event: Event) -> Vec<Action> {
        let mut actions = self.apply(event);
        while actions.iter().any(|action| matches!(action, Action::Record(_))) {
            actions.retain(|action| !matches!(action, Action::Record(_)));
            actions.extend(self.apply(Event::Recorded(Ok(()))));
        }
        actions
    }

    /// Up to the scan, which finds these extents.
    fn scanned(config: Config, held: impl IntoIterator<Item = u32>) -> (Self, Vec<Action>) {
        let mut bench = Self::new(config);
        let route = match bench.machine.config.mode {
            MirrorMode::AfterCopy => Route::Tracked,
            MirrorMode::FromStart => Route::Mirrored,
        };
        assert_eq!(bench.apply_recording(Event::Start), [Action::SetRoute(route)]);
        assert_eq!(bench.apply(Event::RouteSettled(route)), [Action::Scan]);
        let actions = bench.apply_recording(Event::Scanned(held.into_iter().collect()));
        (bench, actions)
    }

    fn copied(&mut self, id: CopyId) -> Vec<Action> {
        self.apply_recording(Event::CopyEnd {
            id,
            result: CopyResult::Done { bytes_written: EXTENT, bytes_zero: 0 },
        })
    }

    fn write(&mut self, id: WriteId, offset: u64, len: u64) -> Vec<Action> {
        self.apply(Event::WriteBegin { id, offset, len, kind: WriteKind::Write })
    }

    fn written(&mut self, id: WriteId) -> Vec<Action> {
        self.apply(Event::WriteEnd { id, source_ok: true, target: Some(Ok(())) })
    }

    /// Equal on both sides, waiting for the switch.
    fn synced(config: Config) -> Self {
        let config = Config { mode: MirrorMode::FromStart, switch: SwitchMode::Manual, ..config };
        let (bench, actions) = Self::scanned(config, []);
        assert_eq!(actions, []);
        assert_eq!(bench.machine.state(), JobState::Synced);
        bench
    }

    /// The commit record is asked for and not known to be durable.
    fn committing(config: Config) -> Self {
        let mut bench = Self::synced(config);
        assert_eq!(bench.apply(Event::Switch), [Action::FlushTarget]);
        let generation = bench.machine.config.plan.generation + 1;
        let committed = Action::Record(Record::Committed { generation });
        assert_eq!(bench.apply(Event::TargetFlushed(Ok(()))), [committed]);
        bench
    }
}

fn copy(id: CopyId, first: u32, count: u32) -> Action {
    Action::Copy { id, range: ExtentRange { first, count } }
}

fn start(id: WriteId, to: WriteTo) -> Action {
    Action::StartWrite { id, to }
}

fn complete(id: WriteId) -> Action {
    Action::CompleteWrite { id, result_of: Side::Source }
}

#[test]
fn a_move_goes_through_its_phases_in_order() {
    let (mut bench, actions) = Bench::scanned(config(4), [0, 2]);
    assert_eq!(actions, [copy(1, 0, 1), copy(2, 2, 1), Action::SetRoute(Route::Mirrored)]);
    assert_eq!(bench.machine.state(), JobState::Mirroring);
    assert_eq!(bench.copied(1), []);
    assert_eq!(bench.copied(2), []);
    assert_eq!(bench.apply_recording(Event::RouteSettled(Route::Mirrored)), [Action::FlushTarget]);
    assert_eq!(bench.machine.state(), JobState::Synced);
    let actions = bench.apply_recording(Event::TargetFlushed(Ok(())));
    assert_eq!(actions, [Action::SetRoute(Route::Target)]);
    assert_eq!(bench.machine.state(), JobState::Committed);
    assert_eq!(bench.apply(Event::RouteSettled(Route::Target)), [Action::FinishTarget]);
    assert_eq!(bench.apply_recording(Event::TargetFinished(Ok(()))), [Action::DeleteSource]);
    assert_eq!(bench.apply_recording(Event::SourceDeleted(Ok(()))), []);
    assert_eq!(bench.machine.state(), JobState::Done);
    assert_eq!(recover(&bench.records), Ok(Recovery::Nothing));
    let progress = bench.machine.progress(bench.now);
    assert_eq!(
        (progress.bytes_copied, progress.bytes_skipped_zero, progress.passes),
        (2 * EXTENT, 2 * EXTENT, 1)
    );
}

#[test]
fn the_source_is_kept_where_that_is_asked_for() {
    let mut bench = Bench::committing(Config { keep_source: true, ..config(1) });
    assert_eq!(bench.apply(Event::Recorded(Ok(()))), [Action::SetRoute(Route::Target)]);
    assert_eq!(bench.apply(Event::RouteSettled(Route::Target)), [Action::FinishTarget]);
    assert_eq!(bench.apply_recording(Event::TargetFinished(Ok(()))), []);
    assert_eq!(bench.machine.state(), JobState::Done);
    let Some(Record::Done { receipt }) = bench.records.last() else {
        panic!("no receipt in {:?}", bench.records)
    };
    assert!(!receipt.source_deleted);
}

#[test]
fn a_copy_leaves_the_disk_where_it_is() {
    let mut bench = Bench::synced(Config { copy_only: true, ..config(2) });
    assert_eq!(bench.apply(Event::Switch), [Action::SetRoute(Route::Source)]);
    assert_eq!(bench.write(1, 0, 512), [start(1, WriteTo::SourceOnly)]);
    assert_eq!(bench.apply(Event::WriteEnd { id: 1, source_ok: true, target: None }), [complete(1)]);
    assert_eq!(bench.apply(Event::RouteSettled(Route::Source)), [Action::FlushTarget]);
    let actions = bench.apply_recording(Event::TargetFlushed(Ok(())));
    assert_eq!(actions, [Action::FinishTarget]);
    assert_eq!(bench.apply_recording(Event::TargetFinished(Ok(()))), []);
    assert_eq!(bench.machine.state(), JobState::Done);
}

#[test]
fn a_complete_copy_that_cannot_be_finished_is_recorded_as_failed_before_it_is_discarded() {
    let mut bench = Bench::synced(Config { copy_only: true, ..config(2) });
    bench.apply(Event::Switch);
    bench.apply(Event::RouteSettled(Route::Source));
    let mut actions = bench.apply_recording(Event::TargetFlushed(Ok(())));
    let mut attempts = 0;
    while actions == [Action::FinishTarget] {
        attempts += 1;
        actions = bench.apply(Event::TargetFinished(Err("EACCES".into())));
        if let [Action::Wake(at)] = actions[..] {
            bench.now = at;
            actions = bench.apply(Event::Tick);
        }
    }
    assert_eq!(attempts, 6);
    assert!(matches!(actions[..], [Action::Record(Record::Failed { .. })]), "{actions:?}");
    assert_eq!(bench.apply(Event::Recorded(Ok(()))), [Action::DiscardTarget]);
    assert_eq!(bench.apply(Event::TargetDiscarded(Ok(()))), []);
    assert!(matches!(bench.machine.state(), JobState::Failed { .. }));
    assert_eq!(recover(&bench.records), Ok(Recovery::SourceIsDisk { restart: false, finish_copy: false }));
}

#[test]
fn only_a_write_to_nothing_but_dirty_extents_skips_the_target() {
    let config = Config { copies_in_flight_max: 1, mode: MirrorMode::FromStart, ..config(8) };
    let (mut bench, actions) = Bench::scanned(config, [0, 3, 4]);
    assert_eq!(actions, [copy(1, 0, 1)]);
    assert_eq!(bench.write(1, 3 * EXTENT, EXTENT), [start(1, WriteTo::SourceOnly)]);
    assert_eq!(bench.write(2, 5 * EXTENT - 512, 1024), [start(2, WriteTo::Both)]);
    assert_eq!(bench.write(3, 6 * EXTENT, 512), [start(3, WriteTo::Both)]);
    assert_eq!(bench.written(2), [complete(2)]);
    // The spanning write has left its dirty extent dirty: it is copied once nothing is in flight there.
    assert_eq!(bench.copied(1), [copy(2, 4, 1)]);
}

#[test]
fn before_the_scan_writes_go_to_the_source_and_are_remembered() {
    let mut bench = Bench::new(Config { mode: MirrorMode::FromStart, ..config(4) });
    assert_eq!(bench.apply_recording(Event::Start), [Action::SetRoute(Route::Mirrored)]);
    assert_eq!(bench.write(1, EXTENT, 512), [start(1, WriteTo::SourceOnly)]);
    assert_eq!(bench.apply(Event::RouteSettled(Route::Mirrored)), [Action::Scan]);
    assert_eq!(bench.apply(Event::WriteEnd { id: 1, source_ok: true, target: None }), [complete(1)]);
    assert_eq!(bench.apply(Event::Scanned(RoaringBitmap::new())), [copy(1, 1, 1)]);
}

#[test]
fn a_write_waits_for_the_copy_of_its_extent_only() {
    let (mut bench, _) = Bench::scanned(Config { mode: MirrorMode::FromStart, ..config(4) }, [1]);
    assert_eq!(bench.write(1, EXTENT, 512), []);
    assert_eq!(bench.write(2, 0, 512), [start(2, WriteTo::Both)]);
    assert_eq!(bench.copied(1)[0], start(1, WriteTo::Both));
}

#[test]
fn writes_that_overlap_go_one_after_the_other() {
    let mut bench = Bench::synced(config(4));
    assert_eq!(bench.write(1, 0, 4096), [start(1, WriteTo::Both)]);
    assert_eq!(bench.write(2, 4096, 4096), [start(2, WriteTo::Both)]);
    assert_eq!(bench.write(3, 2048, 4096), []);
    // It overlaps none that runs, but one that came before it.
    assert_eq!(bench.write(4, 5120, 512), []);
    assert_eq!(bench.written(1), [complete(1)]);
    assert_eq!(bench.written(2), [complete(2), start(3, WriteTo::Both)]);
    assert_eq!(bench.written(3), [complete(3), start(4, WriteTo::Both)]);
}

#[test]
fn a_copy_gets_its_turn_amid_constant_writes() {
    let config = Config { copies_in_flight_max: 1, mode: MirrorMode::FromStart, ..config(2) };
    let (mut bench, _) = Bench::scanned(config, [0, 1]);
    assert_eq!(bench.write(1, EXTENT, 512), [start(1, WriteTo::SourceOnly)]);
    assert_eq!(bench.copied(1), []);
    // The copy of the second extent stands in the queue: later writes come after it.
    assert_eq!(bench.write(2, EXTENT + 512, 512), []);
    let actions = bench.apply(Event::WriteEnd { id: 1, source_ok: true, target: None });
    assert_eq!(actions, [complete(1), copy(2, 1, 1)]);
    assert_eq!(bench.copied(2)[0], start(2, WriteTo::Both));
}

#[test]
fn a_pause_lets_waiting_writes_go() {
    let config = Config { copies_in_flight_max: 1, mode: MirrorMode::FromStart, ..config(1) };
    let (mut bench, _) = Bench::scanned(config, [0]);
    bench.apply(Event::CopyEnd { id: 1, result: CopyResult::TargetFull("ENOSPC".into()) });
    let space = PauseReason::Space("ENOSPC".into());
    assert_eq!(bench.machine.state(), JobState::Paused { reason: space });
    assert_eq!(bench.write(1, 0, 512), [start(1, WriteTo::SourceOnly)]);
    assert_eq!(bench.apply(Event::Resume), []);
    assert_eq!(bench.write(2, 512, 512), []);
    assert_eq!(bench.apply(Event::Pause), [start(2, WriteTo::SourceOnly)]);
}

#[test]
fn a_failed_target_is_left_alone_until_it_is_tried_again() {
    let config = Config { on_target_error: OnTargetError::Retry, ..config(4) };
    let mut bench = Bench::synced(config);
    assert_eq!(bench.write(1, 0, 512), [start(1, WriteTo::Both)]);
    let failed = Event::WriteEnd { id: 1, source_ok: true, target: Some(Err("EIO".into())) };
    assert_eq!(bench.apply(failed), [complete(1), Action::Wake(Tick(101_000))]);
    assert_eq!(bench.machine.state(), JobState::Mirroring);
    assert_eq!(bench.write(2, EXTENT, 512), [start(2, WriteTo::SourceOnly)]);
    assert_eq!(bench.apply(Event::WriteEnd { id: 2, source_ok: true, target: None }), [complete(2)]);
    bench.now = Tick(101_000);
    assert_eq!(bench.apply(Event::Tick), [copy(1, 0, 1), copy(2, 1, 1)]);
}

#[test]
fn an_error_of_the_target_aborts_where_that_is_asked_for() {
    let mut bench = Bench::synced(Config { on_target_error: OnTargetError::Abort, ..config(4) });
    bench.write(1, 0, 512);
    let failed = Event::WriteEnd { id: 1, source_ok: true, target: Some(Err("EIO".into())) };
    assert_eq!(bench.apply(failed), [Action::SetRoute(Route::Source), complete(1)]);
    assert_eq!(bench.apply(Event::RouteSettled(Route::Source)), [Action::DiscardTarget]);
    assert_eq!(bench.apply_recording(Event::TargetDiscarded(Ok(()))), []);
    assert_eq!(bench.machine.state(), JobState::Failed { reason: "the target failed: EIO".into() });
    assert_eq!(recover(&bench.records), Ok(Recovery::SourceIsDisk { restart: false, finish_copy: false }));
}

#[test]
fn a_failed_result_is_held_until_the_commit_is_known() {
    let mut bench = Bench::committing(config(4));
    bench.write(1, 0, 512);
    bench.write(2, 4096, 512);
    bench.write(3, 8192, 512);
    assert_eq!(bench.written(1), [complete(1)]);
    let failed = |id| Event::WriteEnd { id, source_ok: true, target: Some(Err("EIO".into())) };
    assert_eq!(bench.apply(failed(2)), []);
    assert_eq!(bench.apply(Event::FlushFailed { id: 9, error: "EIO".into() }), []);
    let of_target = |id| Action::CompleteWrite { id, result_of: Side::Target };
    let actions = bench.apply(Event::Recorded(Ok(())));
    assert_eq!(actions, [Action::SetRoute(Route::Target), of_target(2), of_target(9)]);
    assert_eq!(bench.apply(failed(3)), [of_target(3)]);
}

#[test]
fn a_commit_that_may_be_durable_is_neither_cancelled_nor_given_up() {
    let mut bench = Bench::committing(config(4));
    assert_eq!(bench.apply(Event::Cancel), []);
    assert_eq!(bench.apply(Event::Recorded(Err("EIO".into()))), [Action::Wake(Tick(101_000))]);
    assert_eq!(bench.apply(Event::Cancel), []);
    assert_eq!(bench.write(1, 0, 512), [start(1, WriteTo::Both)]);
    bench.now = Tick(101_000);
    assert_eq!(bench.apply(Event::Tick), [Action::Record(Record::Committed { generation: 1 })]);
    assert_eq!(bench.apply(Event::Recorded(Ok(()))), [Action::SetRoute(Route::Target)]);
}

#[test]
fn a_cancelled_move_discards_its_target_when_nothing_uses_it_any_more() {
    let (mut bench, actions) = Bench::scanned(config(1), [0]);
    assert_eq!(actions, [copy(1, 0, 1), Action::SetRoute(Route::Mirrored)]);
    assert_eq!(bench.write(1, 0, 512), []);
    assert_eq!(bench.apply(Event::Cancel), [Action::SetRoute(Route::Source), start(1, WriteTo::SourceOnly)]);
    assert_eq!(bench.apply(Event::RouteSettled(Route::Mirrored)), []);
    assert_eq!(bench.apply(Event::WriteEnd { id: 1, source_ok: true, target: None }), [complete(1)]);
    assert_eq!(bench.apply(Event::RouteSettled(Route::Source)), []);
    assert_eq!(bench.copied(1), [Action::DiscardTarget]);
    assert_eq!(bench.apply_recording(Event::TargetDiscarded(Ok(()))), []);
    assert_eq!(bench.machine.state(), JobState::Cancelled);
}

#[test]
fn a_move_that_was_not_begun_is_ended_in_the_journal_too_or_it_would_begin_at_the_next_start() {
    let reason = "a parent could not be copied";
    for (event, state, record) in [
        (Event::Cancel, JobState::Cancelled, Record::Cancelled),
        (
            Event::PreparationFailed(reason.into()),
            JobState::Failed { reason: reason.into() },
            Record::Failed { reason: reason.into() },
        ),
    ] {
        let mut bench = Bench::new(config(1));
        assert_eq!(bench.apply(event), [Action::DiscardTarget]);
        assert_eq!(bench.apply(Event::Start), []);
        assert_eq!(bench.apply(Event::TargetDiscarded(Ok(()))), [Action::Record(record)]);
        assert_eq!(bench.apply(Event::Recorded(Ok(()))), []);
        assert_eq!(bench.machine.state(), state);
    }
}

#[test]
fn a_failed_flush_of_the_target_makes_everything_dirty() {
    let mut bench = Bench::synced(Config { copy_bytes_max: 4 * EXTENT, ..config(4) });
    assert_eq!(bench.apply(Event::Switch), [Action::FlushTarget]);
    assert_eq!(bench.apply(Event::TargetFlushed(Err("EIO".into()))), [Action::FlushSourceOnly]);
    assert_eq!(bench.machine.state(), JobState::Paused { reason: PauseReason::TargetError("EIO".into()) });
    assert_eq!(bench.machine.progress(bench.now).bytes_dirty, 4 * EXTENT);
    assert_eq!(bench.apply(Event::Resume), [copy(1, 0, 4)]);
}

#[test]
fn a_difference_counts_only_where_nothing_was_written() {
    let verify = |id, first, count| Action::Verify { id, range: ExtentRange { first, count } };
    let different = |id| Event::VerifyEnd { id, result: VerifyResult::Different { offset: 0 } };
    let config = Config {
        verify: Verify::Full,
        copy_bytes_max: 2 * EXTENT,
        copies_in_flight_max: 1,
        mode: MirrorMode::FromStart,
        ..config(2)
    };
    let (mut bench, actions) = Bench::scanned(config, []);
    assert_eq!(actions, [verify(1, 0, 2)]);
    // Written before and during it: looked at again, extent by extent.
    assert_eq!(bench.write(1, 0, 512), [start(1, WriteTo::Both)]);
    assert_eq!(bench.apply(different(1)), [verify(2, 0, 1)]);
    assert_eq!(bench.apply(different(2)), [verify(3, 1, 1)]);
    assert_eq!(bench.apply(Event::VerifyEnd { id: 3, result: VerifyResult::Equal }), [verify(4, 0, 1)]);
    // Three times is enough: now writes wait for it, and it for the write in flight.
    assert_eq!(bench.apply(different(4)), []);
    assert_eq!(bench.write(2, 512, 512), []);
    assert_eq!(bench.written(1), [complete(1), verify(5, 0, 1)]);
    assert_eq!(bench.apply(different(5)), [Action::SetRoute(Route::Source), start(2, WriteTo::SourceOnly)]);
}

#[test]
fn samples_are_the_first_extent_the_last_and_one_of_each_64() {
    let mut bench = Bench::synced(Config {
        verify: Verify::None,
        copies_in_flight_max: 64,
        plan: Plan { job: "a".into(), ..Plan::default() },
        ..config(1000)
    });
    assert_eq!(bench.apply(Event::Switch), [Action::FlushTarget]);
    let sampling = Config {
        verify: Verify::Sample,
        copies_in_flight_max: 64,
        mode: MirrorMode::FromStart,
        ..config(1000)
    };
    let (_, actions) = Bench::scanned(sampling, []);
    let mut samples: Vec<u32> = actions
        .iter()
        .map(|action| match action {
            Action::Verify { range: ExtentRange { first, count: 1 }, .. } => *first,
            other => panic!("{other:?} is no sample"),
        })
        .collect();
    assert_eq!(samples.len(), 1000_usize.div_ceil(64) + 2);
    assert!(samples.contains(&0) && samples.contains(&999));
    samples.truncate(1000_usize.div_ceil(64));
    let groups: Vec<u32> = samples.iter().map(|sample| sample / 64).collect();
    assert_eq!(groups, (0..16).collect::<Vec<u32>>());
}

#[test]
fn copies_are_small_while_guest_writes_wait_for_them() {
    let big = Config { copy_bytes_max: 16 * EXTENT, copies_in_flight_max: 1, ..config(64) };
    let (_, actions) = Bench::scanned(big.clone(), 0..64);
    assert_eq!(actions, [copy(1, 0, 16)]);
    let (_, actions) = Bench::scanned(Config { mode: MirrorMode::FromStart, ..big }, 0..64);
    assert_eq!(actions, [copy(1, 0, 4)]);
}

#[test]
fn the_limit_makes_copies_wait_and_can_be_lifted() {
    let config = Config { bandwidth: Some(EXTENT), mode: MirrorMode::FromStart, ..config(4) };
    let (mut bench, actions) = Bench::scanned(config, 0..4);
    // Time began long ago: a tenth of a second's worth was saved up, and one extent takes a second.
    let [Action::Copy { .. }, Action::Wake(at)] = actions[..] else {
        panic!("{actions:?} is not one copy and a wait")
    };
    assert!(at > Tick(900_000) && at < Tick(1_002_000), "{at:?}");
    assert_eq!(bench.apply(Event::SetBandwidth(None)), [copy(2, 1, 1), copy(3, 2, 1), copy(4, 3, 1)]);
}

#[test]
fn copies_and_comparisons_wait_for_a_guest_that_is_over_its_budget() {
    let big =
        Config { copy_bytes_max: 4 * EXTENT, copies_in_flight_max: 1, verify: Verify::Full, ..config(16) };
    let (mut bench, actions) = Bench::scanned(big, 0..12);
    assert_eq!(actions, [copy(1, 0, 4)]);
    assert_eq!(bench.apply(Event::SetMaxGuestP99(Some(1_000))), []);
    let slow = || Event::GuestServed([(9_000, 1_000)].into_iter().collect());
    for _ in 0..10 {
        bench.now = bench.now.plus_us(2_000);
        assert_eq!(bench.apply(slow()), []);
    }
    // Each copy is of one extent now, and a pause comes after it.
    let ended = bench.copied(1);
    let [Action::Wake(at)] = ended[..] else { panic!("{ended:?} is no pause") };
    assert!(at > bench.now);
    bench.now = at;
    assert_eq!(bench.apply(Event::Tick), [copy(2, 4, 1)]);
    let progress = bench.machine.progress(bench.now);
    assert_eq!((progress.max_guest_p99_us, progress.guest_p99_us), (Some(1_000), Some(9_000)));
    // Nothing is held up once the budget is gone, but for the rest that shows what the guest sees without a move.
    assert_eq!(bench.apply(Event::SetMaxGuestP99(None)), []);
    for _ in 0..50 {
        bench.now = bench.now.plus_us(50_000);
        bench.apply(Event::GuestServed(Default::default()));
    }
    assert_eq!(bench.copied(2), [copy(3, 5, 4)]);
}

#[test]
fn a_move_of_a_busy_disk_rests_first_to_see_how_fast_it_is_alone() {
    let (mut bench, _) = Bench::scanned(Config { copy_bytes_max: 4 * EXTENT, ..config(64) }, []);
    let heard = |bench: &mut Bench| {
        bench.now = bench.now.plus_us(50_000);
        bench.apply(Event::GuestServed([(100, 500)].into_iter().collect()))
    };
    assert_eq!(heard(&mut bench), []);
    let rest = bench.apply(Event::Dirtied(ExtentRange { first: 0, count: 64 }));
    assert!(matches!(rest[..], [Action::Wake(_)]), "{rest:?}");
    for _ in 0..3 {
        assert_eq!(heard(&mut bench), []);
    }
    assert_eq!(heard(&mut bench), [copy(1, 0, 1)]);
}

#[test]
fn the_sweep_finds_what_is_dirty_in_large_sets() {
    let extents = 400_000_u32;
    let big = Config {
        copy_bytes_max: EXTENT,
        copies_in_flight_max: 1,
        mode: MirrorMode::FromStart,
        ..config(400_000)
    };
    let held: Vec<u32> =
        (0..extents).filter(|extent| extent % 3000 == 7 || (65_530..65_545).contains(extent)).collect();
    let (mut bench, mut actions) = Bench::scanned(big, held.clone());
    for (index, &extent) in held.iter().enumerate() {
        assert_eq!(actions, [copy(index as u64 + 1, extent, 1)]);
        actions = bench.copied(index as u64 + 1);
    }
    assert_eq!(actions, [Action::FlushTarget]);
}

#[test]
fn the_last_extent_may_be_a_part_of_one() {
    let config = Config { disk_size: 3 * EXTENT + 512, mode: MirrorMode::FromStart, ..config(4) };
    let (bench, _) = Bench::scanned(config, [0, 3]);
    let progress = bench.machine.progress(bench.now);
    assert_eq!((progress.bytes_dirty, progress.bytes_skipped_zero), (EXTENT + 512, 2 * EXTENT));
}

#[test]
#[should_panic(expected = "is not within the disk's")]
fn a_write_beyond_the_disk_is_the_callers_bug() {
    Bench::synced(config(1)).write(1, EXTENT - 512, 1024);
}

#[test]
#[should_panic(expected = "ended without having begun")]
fn an_end_without_a_beginning_is_the_callers_bug() {
    Bench::synced(config(1)).written(1);
}

#[test]
fn parameters_out_of_range_are_refused() {
    assert_eq!(config(4).check(), Ok(()));
    for bad in [
        Config { disk_size: 0, ..config(1) },
        Config { extent_size: 2048, ..config(1) },
        Config { extent_size: 96 << 10, ..config(1) },
        Config { extent_size: 32 << 20, copy_bytes_max: 32 << 20, ..config(1) },
        Config { disk_size: 1 << 45, extent_size: 4096, copy_bytes_max: 4096, ..config(1) },
        Config { copies_in_flight_max: 0, ..config(1) },
        Config { copy_bytes_max: EXTENT + 1, ..config(1) },
        Config { bandwidth: Some(0), ..config(1) },
        Config { max_guest_p99_us: Some(0), ..config(1) },
        Config { plan: Plan { generation: u64::MAX, ..Plan::default() }, ..config(1) },
    ] {
        assert!(bad.check().is_err(), "{bad:?}");
    }
}

#[test]
fn a_caller_with_one_alarm_never_misses_a_wake_up() {
    let config = Config { on_target_error: OnTargetError::Retry, copies_in_flight_max: 2, ..config(4) };
    let (mut bench, _) = Bench::scanned(Config { mode: MirrorMode::FromStart, ..config }, [0, 1]);
    let failed = |id| Event::CopyEnd { id, result: CopyResult::TargetError("EIO".into()) };
    assert_eq!(bench.apply(failed(1)), [Action::Wake(Tick(101_000))]);
    assert_eq!(bench.apply(Event::Resume), [copy(3, 0, 1)]);
    bench.now = Tick(50_000);
    // The alarm is set for an earlier time than is needed now. It stays so, though that time passes amid other events ...
    assert_eq!(bench.apply(failed(3)), []);
    bench.now = Tick(101_000);
    assert_eq!(bench.apply(Event::SetBandwidth(None)), []);
    // ... until it goes off.
    assert_eq!(bench.apply(Event::Tick), [Action::Wake(Tick(150_000))]);
    bench.now = Tick(150_000);
    assert_eq!(bench.apply(Event::Tick), [copy(4, 0, 1)]);
}
