//! Stock Linux in machines of `kvm-shim`, which move while it works.

use std::time::{Duration, Instant};

use serde_json::Value;
use system_tests::guest::{End, Guest, Host, Image, Machine, Setup};

/// How long all of it may take, on a machine that is busy with other tests. Alone it takes a minute.
const PATIENCE: Duration = Duration::from_secs(400);

/// What a kernel says when it did not get a processor for long: of itself, or of those it waits for.
const STARVED: [&str; 3] = ["soft lockup", "stall", "blocked for more than"];
/// What a kernel says when something is wrong with its timers, interrupts, processors or disk.
const COMPLAINTS: [&str; 9] = [
    "BUG: unable",
    "Oops",
    "panic",
    "hard LOCKUP",
    "unstable",
    "nobody cared",
    "I/O error",
    "not a head",
    "WARNING:",
];

#[test]
fn linux_boots_in_a_machine_and_works_on_while_the_machine_moves() {
    let Some(setup) = Setup::find_or_skip("Linux in machines that move") else { return };
    let begin = Instant::now();
    let folder = tempfile::tempdir().unwrap();
    let machines = vec![
        Machine { cpus: 1, kernel: Image::BzImage, end: End::Reboot },
        Machine { cpus: 2, kernel: Image::Elf, end: End::PowerOff },
    ];
    let host = Host { moves: 2, machines };
    let mut guest = Guest::start_host(&setup, folder.path(), &host).unwrap();
    guest.wait_for("PASS", PATIENCE).unwrap();
    guest.wait_end(PATIENCE).unwrap();

    let said = guest.said();
    let shown: Vec<_> = said.lines().filter_map(|line| line.strip_prefix("MACHINE: ")).collect();
    // Where the host itself was not run for long, its machines were not either, and may say so.
    let host_starved = said.lines().any(|line| {
        !line.starts_with("MACHINE: ") && STARVED.iter().any(|complaint| line.contains(complaint))
    });
    let of_time = if host_starved { &[][..] } else { &STARVED[..] };
    for complaint in COMPLAINTS.iter().chain(of_time) {
        let line = shown.iter().find(|line| line.contains(complaint));
        assert_eq!(line, None, "a machine's kernel complains");
    }
    for machine in &host.machines {
        let disk = format!("queues={0} cpus={0} serial=root", machine.cpus);
        assert!(shown.iter().any(|line| line.contains(&disk)), "a machine sees {disk}:\n{said}");
    }
    let checked = shown.iter().filter(|line| line.contains("blocks hold what was written")).count();
    assert_eq!(checked, host.machines.len(), "each machine read back what it wrote");
    let moves: Vec<Value> = said
        .lines()
        .filter_map(|line| line.strip_prefix("GUEST: moved "))
        .map(|json| serde_json::from_str(json).unwrap())
        .collect();
    assert_eq!(moves.len(), host.machines.len() * host.moves as usize);
    for info in &moves {
        assert_eq!(info["state"], "done", "{info}");
        println!(
            "moved in {} ms, {} rounds, stood still for {} us",
            info["elapsed_ms"], info["round"], info["downtime_us"]
        );
    }
    println!("{:?} done in {:.1?}", host, begin.elapsed());
}
