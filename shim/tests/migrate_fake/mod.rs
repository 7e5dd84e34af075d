//! A machine without processors: threads scribble into its memory, and software remembers which pages they wrote.
#![allow(dead_code, reason = "each test file uses a part of it")]

pub mod proxy;

use std::collections::HashSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use shim::machine::{
    CompatibilityReport, CpuDescription, Description, Finding, MachineState, SourceMachine, TargetHost,
    TargetMachine,
};
use shim::memory::GuestRam;
use shim::migrate::target::TargetEvent;
use shim::migrate::{
    Address, CancelToken, Listener, ReceiveOptions, Received, Security, SendOptions, receive,
};
use shim::pages::{PAGE_BYTES, PageSet};

/// What the target expects with the storage.
pub const HANDOVER: &[u8] = b"generation 7";

/// Who has the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Storage {
    Source,
    Nobody,
    Target,
}

/// What both sides share: the machine there is one of, and its disk.
pub struct World {
    pub source_runs: AtomicBool,
    pub target_runs: AtomicBool,
    pub storage: Mutex<Storage>,
    /// Methods that fail, by name.
    pub fails: Mutex<HashSet<&'static str>>,
    /// What went against the rules.
    pub broken: Mutex<Vec<String>>,
    pub devices_started: AtomicBool,
    pub announced: AtomicBool,
    /// What the source hands over with its storage.
    pub handover: Mutex<Vec<u8>>,
    /// Memory of the last machine that was made at the target.
    pub target_ram: Mutex<Option<Arc<GuestRam>>>,
    /// Pages that restoring the state reads.
    pub restore_reads: Mutex<Vec<u64>>,
    /// What happens when the target is about to give the storage back.
    pub before_return: Mutex<Option<Box<dyn FnOnce() + Send>>>,
}

impl World {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            source_runs: AtomicBool::new(true),
            target_runs: AtomicBool::new(false),
            storage: Mutex::new(Storage::Source),
            fails: Mutex::default(),
            broken: Mutex::default(),
            devices_started: AtomicBool::new(false),
            announced: AtomicBool::new(false),
            handover: Mutex::new(HANDOVER.to_vec()),
            target_ram: Mutex::default(),
            restore_reads: Mutex::default(),
            before_return: Mutex::default(),
        })
    }

    pub fn fail(&self, method: &'static str) {
        self.fails.lock().expect("nobody panics with it").insert(method);
    }

    pub fn heal(&self) {
        self.fails.lock().expect("nobody panics with it").clear();
    }

    fn may_fail(&self, method: &str) -> Result<()> {
        ensure!(
            !self.fails.lock().expect("nobody panics with it").contains(method),
            "{method} was told to fail"
        );
        Ok(())
    }

    fn rule(&self, kept: bool, rule: &str) {
        if !kept {
            self.broken.lock().expect("nobody panics with it").push(rule.to_owned());
        }
    }

    fn give(&self, from: &[Storage], to: Storage) -> Result<()> {
        let mut storage = self.storage.lock().expect("nobody panics with it");
        if !from.contains(&storage) {
            self.rule(false, &format!("the storage goes from {storage:?} to {to:?}"));
            bail!("the storage is with {storage:?}");
        }
        *storage = to;
        Ok(())
    }

    /// Which side runs the machine: 's', 't', or '-' for none.
    pub fn runs(&self) -> char {
        match (self.source_runs.load(SeqCst), self.target_runs.load(SeqCst)) {
            (true, false) => 's',
            (false, true) => 't',
            (false, false) => '-',
            (true, true) => 'B',
        }
    }

    pub fn assert_rules_kept(&self) {
        let broken = self.broken.lock().expect("nobody panics with it");
        assert!(broken.is_empty(), "{broken:?}");
        assert_ne!(self.runs(), 'B');
    }
}

/// How written pages are reported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Log {
    /// Collecting forgets them.
    Classic,
    /// Only [`SourceMachine::before_copy`] forgets them.
    Manual,
}

struct Shared {
    world: Arc<World>,
    ram: Arc<GuestRam>,
    log: Log,
    logging: AtomicBool,
    dirty: Vec<AtomicU64>,
    throttle: AtomicU8,
    ended: AtomicBool,
    /// Pages written per second, all writers together; 0 for none.
    rate: AtomicU64,
    /// The writers write below this page only.
    span: AtomicU64,
    quit: AtomicBool,
    /// Held by a writer for each write, so that a pause is exact.
    writing: Mutex<()>,
    throttled: Mutex<Vec<u8>>,
}

impl Shared {
    fn write(&self, page: u64, content: &[u8]) {
        self.ram.write_pages(page, content);
        // After the write: a copy that misses it must find the mark.
        if self.logging.load(SeqCst) {
            self.dirty[(page / 64) as usize].fetch_or(1 << (page % 64), SeqCst);
        }
    }
}

/// A machine that runs at the source.
pub struct FakeSource {
    shared: Arc<Shared>,
    writers: Mutex<Vec<JoinHandle<()>>>,
}

impl FakeSource {
    /// With stamped memory in the first half, zeroes in the rest; `rate` pages are written each second.
    pub fn new(world: &Arc<World>, bytes: u64, log: Log, rate: u64) -> Self {
        Self::with_ram(world, GuestRam::new(bytes, false).expect("memory"), log, rate)
    }

    /// The same in this memory.
    pub fn with_ram(world: &Arc<World>, ram: Arc<GuestRam>, log: Log, rate: u64) -> Self {
        for page in 0..ram.pages() / 2 {
            ram.write_pages(page, &stamp(page, 0));
        }
        let span = ram.pages();
        let shared = Arc::new(Shared {
            world: world.clone(),
            dirty: (0..ram.pages().div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
            ram,
            log,
            logging: AtomicBool::new(false),
            throttle: AtomicU8::new(0),
            ended: AtomicBool::new(false),
            rate: AtomicU64::new(rate),
            span: AtomicU64::new(span),
            quit: AtomicBool::new(false),
            writing: Mutex::new(()),
            throttled: Mutex::default(),
        });
        let writers = (0..2)
            .map(|seed| {
                let shared = shared.clone();
                std::thread::spawn(move || scribble(&shared, seed))
            })
            .collect();
        Self { shared, writers: Mutex::new(writers) }
    }

    pub fn set_rate(&self, pages_per_second: u64) {
        self.shared.rate.store(pages_per_second, SeqCst);
    }

    pub fn set_span(&self, pages: u64) {
        self.shared.span.store(pages, SeqCst);
    }

    pub fn is_logging(&self) -> bool {
        self.shared.logging.load(SeqCst)
    }

    pub fn throttled(&self) -> Vec<u8> {
        self.shared.throttled.lock().expect("nobody panics with it").clone()
    }

    pub fn ended(&self) -> bool {
        self.shared.ended.load(SeqCst)
    }

    /// It runs as if nothing had happened.
    pub fn assert_untouched(&self) {
        assert!(!self.is_logging(), "logging was left on");
        assert_eq!(self.shared.throttle.load(SeqCst), 0, "throttled");
        assert_eq!(self.shared.world.runs(), 's');
        assert_eq!(*self.shared.world.storage.lock().expect("nobody panics with it"), Storage::Source);
    }
}

impl Drop for FakeSource {
    fn drop(&mut self) {
        self.shared.quit.store(true, SeqCst);
        for writer in self.writers.lock().expect("nobody panics with it").drain(..) {
            writer.join().expect("a writer");
        }
    }
}

/// Content of a page that was written the n-th time.
pub fn stamp(page: u64, n: u64) -> Vec<u8> {
    let mut content = vec![0; PAGE_BYTES];
    for (i, word) in content.as_chunks_mut::<8>().0.iter_mut().enumerate() {
        let mixed = (page << 32 | n).wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(i as u64 / 16);
        *word = mixed.to_le_bytes();
    }
    content
}

fn scribble(shared: &Shared, seed: u64) {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut n = 0;
    let mut next = Instant::now();
    while !shared.quit.load(SeqCst) {
        let rate = shared.rate.load(SeqCst) * u64::from(100 - shared.throttle.load(SeqCst)) / 100 / 2;
        if rate == 0 || !shared.world.source_runs.load(SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
            next = Instant::now();
            continue;
        }
        // In small bursts: sleeping for each page would be too coarse.
        for _ in 0..(rate / 500).max(1) {
            let _writing = shared.writing.lock().expect("nobody panics with it");
            if !shared.world.source_runs.load(SeqCst) {
                break;
            }
            n += 1;
            let page = random.random_range(0..shared.span.load(SeqCst));
            match random.random_range(0..10) {
                0 => shared.write(page, &[0; PAGE_BYTES]),
                _ => shared.write(page, &stamp(page, n)),
            }
        }
        next += Duration::from_secs_f64((rate / 500).max(1) as f64 / rate as f64);
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
    }
}

pub fn description(bytes: u64) -> Description {
    Description {
        name: "vm one".into(),
        shim_version: "0".into(),
        state_version: 1,
        memory_bytes: bytes,
        huge_pages: false,
        vcpus: 1,
        cpu: CpuDescription {
            vendor: "GenuineIntel".into(),
            model: String::new(),
            baseline: None,
            cpuid: vec![],
            msrs: vec![],
            tsc_khz: 1,
        },
        capabilities: vec![],
        devices: vec![],
    }
}

impl SourceMachine for FakeSource {
    fn description(&self) -> Result<Description> {
        let ram = &self.shared.ram;
        Ok(Description { huge_pages: ram.huge_pages(), ..description(ram.bytes()) })
    }

    fn ram(&self) -> &Arc<GuestRam> {
        &self.shared.ram
    }

    fn start_logging(&self) -> Result<()> {
        self.shared.world.may_fail("start_logging")?;
        // As with KVM's log that begins full: nothing is forgotten before it was copied.
        self.shared.logging.store(true, SeqCst);
        Ok(())
    }

    fn stop_logging(&self) -> Result<()> {
        self.shared.logging.store(false, SeqCst);
        for word in &self.shared.dirty {
            word.store(0, SeqCst);
        }
        Ok(())
    }

    fn collect_dirty(&self, into: &mut PageSet) -> Result<()> {
        self.shared.world.may_fail("collect_dirty")?;
        let words: Vec<u64> = match self.shared.log {
            Log::Classic => self.shared.dirty.iter().map(|word| word.swap(0, SeqCst)).collect(),
            Log::Manual => self.shared.dirty.iter().map(|word| word.load(SeqCst)).collect(),
        };
        into.insert_bits(0, &words);
        Ok(())
    }

    fn before_copy(&self, first_page: u64, bits: &[u64]) -> Result<()> {
        assert!(first_page.is_multiple_of(64));
        for (word, bits) in self.shared.dirty[(first_page / 64) as usize..].iter().zip(bits) {
            if self.shared.log == Log::Manual {
                word.fetch_and(!bits, SeqCst);
            }
        }
        self.shared.world.may_fail("before_copy")
    }

    fn throttle(&self, percent: u8) {
        self.shared.throttle.store(percent, SeqCst);
        self.shared.throttled.lock().expect("nobody panics with it").push(percent);
    }

    fn pause(&self) -> Result<()> {
        self.shared.world.may_fail("pause")?;
        let _writing = self.shared.writing.lock().expect("nobody panics with it");
        self.shared.world.source_runs.store(false, SeqCst);
        Ok(())
    }

    fn save(&self) -> Result<MachineState> {
        self.shared.world.may_fail("save")?;
        self.shared.world.rule(!self.shared.world.source_runs.load(SeqCst), "saved while it runs");
        Ok(MachineState(b"the state".to_vec()))
    }

    fn resume(&self) -> Result<()> {
        self.shared.world.may_fail("source resume")?;
        let world = &self.shared.world;
        world.rule(!world.target_runs.load(SeqCst), "the source runs while the target does");
        world.rule(
            *world.storage.lock().expect("nobody panics with it") == Storage::Source,
            "the source runs without its storage",
        );
        world.source_runs.store(true, SeqCst);
        Ok(())
    }

    fn release_storage(&self) -> Result<Vec<u8>> {
        self.shared.world.may_fail("release_storage")?;
        self.shared.world.rule(!self.shared.world.source_runs.load(SeqCst), "released while it runs");
        self.shared.world.give(&[Storage::Source], Storage::Nobody)?;
        Ok(self.shared.world.handover.lock().expect("nobody panics with it").clone())
    }

    fn reclaim_storage(&self) -> Result<()> {
        self.shared.world.may_fail("reclaim_storage")?;
        self.shared.world.give(&[Storage::Nobody, Storage::Source], Storage::Source)
    }

    fn end(&self) {
        self.shared.world.rule(!self.shared.world.source_runs.load(SeqCst), "ended while it runs");
        self.shared.ended.store(true, SeqCst);
    }
}

/// A machine at the target.
pub struct FakeTarget {
    world: Arc<World>,
    ram: Arc<GuestRam>,
    restored: bool,
    took: bool,
}

impl TargetMachine for FakeTarget {
    fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    fn restore(&mut self, state: &MachineState) -> Result<()> {
        self.world.may_fail("restore")?;
        ensure!(state.0 == b"the state", "another state");
        for page in self.world.restore_reads.lock().expect("nobody panics with it").iter() {
            self.ram.read_pages(*page, &mut [0; PAGE_BYTES]);
        }
        self.restored = true;
        Ok(())
    }

    fn take_storage(&mut self, handover: &[u8]) -> Result<()> {
        self.world.may_fail("take_storage")?;
        ensure!(handover == HANDOVER, "another handover");
        self.world.give(&[Storage::Nobody], Storage::Target)?;
        self.took = true;
        Ok(())
    }

    fn return_storage(&mut self) -> Result<()> {
        if let Some(happens) = self.world.before_return.lock().expect("nobody panics with it").take() {
            happens();
        }
        self.world.may_fail("return_storage")?;
        if self.took {
            self.world.give(&[Storage::Target], Storage::Nobody)?;
            self.took = false;
        }
        Ok(())
    }

    fn resume(&mut self) -> Result<()> {
        self.world.may_fail("target resume")?;
        self.world.rule(self.restored && self.took, "the target runs without state or storage");
        self.world.rule(!self.world.source_runs.load(SeqCst), "the target runs while the source does");
        self.world.target_runs.store(true, SeqCst);
        Ok(())
    }

    fn start_devices(&mut self) -> Result<()> {
        self.world.rule(self.world.target_runs.load(SeqCst), "devices began before the processors");
        self.world.devices_started.store(true, SeqCst);
        Ok(())
    }

    fn announce(&mut self) -> Result<()> {
        self.world.announced.store(true, SeqCst);
        Ok(())
    }
}

impl Drop for FakeTarget {
    fn drop(&mut self) {
        self.world.target_runs.store(false, SeqCst);
        if self.took {
            *self.world.storage.lock().expect("nobody panics with it") = Storage::Nobody;
        }
    }
}

/// Makes machines.
pub struct FakeHost {
    pub world: Arc<World>,
    pub incompatible: bool,
}

impl TargetHost for FakeHost {
    fn check(&self, description: &Description) -> CompatibilityReport {
        let finding = Finding {
            kind: "memory".into(),
            fatal: true,
            needed: description.memory_bytes.to_string(),
            found: "0".into(),
            message: "there is no memory; add some".into(),
        };
        CompatibilityReport { findings: if self.incompatible { vec![finding] } else { vec![] } }
    }

    fn create(&self, description: &Description) -> Result<Box<dyn TargetMachine>> {
        self.world.may_fail("create")?;
        let ram = GuestRam::new(description.memory_bytes, description.huge_pages)?;
        *self.world.target_ram.lock().expect("nobody panics with it") = Some(ram.clone());
        Ok(Box::new(FakeTarget { world: self.world.clone(), ram, restored: false, took: false }))
    }
}

/// A target in a thread of its own.
pub struct Target {
    pub address: Address,
    pub options: ReceiveOptions,
    pub events: Arc<Mutex<Vec<TargetEvent>>>,
    thread: Option<JoinHandle<Result<Option<Received>>>>,
}

impl Target {
    pub fn start(world: &Arc<World>, address: &Address, security: &Security, dir: &Path) -> Self {
        Self::start_with(FakeHost { world: world.clone(), incompatible: false }, address, security, dir)
    }

    pub fn start_with(
        host: impl TargetHost + 'static,
        address: &Address,
        security: &Security,
        dir: &Path,
    ) -> Self {
        let listener = Listener::bind(address, security).expect("listens");
        let address = listener.address().expect("address");
        let mut options = ReceiveOptions::new(dir.join("target"));
        options.patience = Duration::from_secs(8);
        let events = Arc::new(Mutex::new(Vec::new()));
        let (for_thread, seen) = (options.clone(), events.clone());
        let thread = std::thread::spawn(move || {
            receive(listener, &host, &for_thread, &|event| {
                seen.lock().expect("nobody panics with it").push(event.clone())
            })
        });
        Self { address, options, events, thread: Some(thread) }
    }

    /// The machine that runs.
    pub fn received(mut self) -> Received {
        let thread = self.thread.take().expect("not taken yet");
        thread.join().expect("no panic").expect("no error").expect("a machine")
    }

    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until something happened.
    pub fn await_event(&self, what: impl Fn(&TargetEvent) -> bool) {
        let until = Instant::now() + Duration::from_secs(60);
        while !self.events.lock().expect("nobody panics with it").iter().any(&what) {
            assert!(Instant::now() < until, "{:?}", self.events.lock().expect("nobody panics with it"));
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        self.options.stop.cancel();
        self.options.discard.cancel();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Options that suit a test.
pub fn options(to: &Address, dir: &Path) -> SendOptions {
    let mut options = SendOptions::new(to.clone(), dir.join("source"));
    options.patience = Duration::from_secs(8);
    options.reconnect = Duration::from_secs(8);
    options
}

pub fn unix(dir: &Path) -> Address {
    Address::Unix(dir.join("target.sock"))
}

pub fn send(
    machine: &dyn SourceMachine,
    options: &SendOptions,
) -> Result<shim::migrate::Report, shim::migrate::SendError> {
    shim::migrate::send(machine, options, &|_| {}, &CancelToken::new())
}

/// Both memories are the same.
pub fn assert_same(source: &GuestRam, target: &GuestRam) {
    assert_eq!(source.pages(), target.pages());
    let (mut a, mut b) = (vec![0; PAGE_BYTES], vec![0; PAGE_BYTES]);
    let differ: Vec<u64> = (0..source.pages())
        .filter(|page| {
            source.read_pages(*page, &mut a);
            target.read_pages(*page, &mut b);
            a != b
        })
        .collect();
    assert!(
        differ.is_empty(),
        "{} pages differ, the first are {:?}",
        differ.len(),
        &differ[..differ.len().min(10)]
    );
}
