//! Memory of the daemon: for a disk that does nothing, and for the largest image that there is.

use std::path::Path;

use anyhow::{Context, Result};
use formats::{CreateOptions, Format};
use serde_json::json;

use crate::choice::{Common, Kind};
use crate::drive::{Access, Link, PAGE, Pattern, Wait};
use crate::process;
use crate::served::{Disk, Served};
use crate::size::{MIB, show_size};
use crate::spread::{Bound, Goal, Spread};
use crate::table::{Table, number};

use super::Ask;

/// Bytes for the data of a queue's requests.
const POOL: u64 = 256 << 10;
/// The largest VHDX.
const HUGE: u64 = 64 << 40;

/// Measures both.
pub fn run(ask: &mut Ask<'_>) -> Result<()> {
    eprintln!("memory ...");
    let mut table = Table::new(1, ["the daemon's resident memory (VmRSS)", "MiB"]);
    idle(ask, &mut table)?;
    for block_size in [None, Some(MIB as u32)] {
        huge(ask, &mut table, block_size)?;
    }
    ask.finding.tables.push(("Memory".into(), table));
    Ok(())
}

fn idle(ask: &mut Ask<'_>, table: &mut Table) -> Result<()> {
    let (base, idle) = (ask.common.memory_dir(), u64::from(ask.scale.idle_disks));
    for connected in [false, true] {
        let (one, many) = (resident(&base, 1, connected)?, resident(&base, idle + 1, connected)?);
        let state = if connected { "with rings that run" } else { "without a front end" };
        let each = many.saturating_sub(one) as f64 / idle as f64 / MIB as f64;
        table.row([format!("1 idle VHDX {state}"), mib(one)]);
        table.row([format!("{} idle VHDX {state}", idle + 1), mib(many)]);
        add_goal(ask, "memory", format!("each idle disk {state}"), each, 2.0);
        ask.figures.insert(format!("idle disks {state}"), json!({"1": one, (idle + 1).to_string(): many}));
    }
    Ok(())
}

fn resident(base: &Path, count: u64, connected: bool) -> Result<u64> {
    let dir = Common::folder_in(base)?;
    let mut disks = Vec::new();
    for n in 0..count {
        let image = dir.path().join(format!("{n}.vhdx"));
        formats::create(&image, &CreateOptions::new(Format::Vhdx, 64 << 30))?;
        disks.push(Disk::new(format!("{n}"), Kind::Vhdx.image(), image));
    }
    let served = Served::blockd(dir.path(), &disks)?;
    let mut links = Vec::new();
    for disk in disks.iter().filter(|_| connected) {
        links.push(Link::with_queues(&served.socket(&disk.id)?, 1, POOL, 1)?);
    }
    // Whatever they do at the start is over then.
    std::thread::sleep(std::time::Duration::from_millis(500));
    let resident = process::resident_bytes(served.pid())?;
    drop(links);
    served.stop()?;
    Ok(resident)
}

fn huge(ask: &mut Ask<'_>, table: &mut Table, block_size: Option<u32>) -> Result<()> {
    let dir = Common::folder_in(&ask.common.memory_dir())?;
    let image = dir.path().join("huge.vhdx");
    let options = CreateOptions { block_size, ..CreateOptions::new(Format::Vhdx, HUGE) };
    formats::create(&image, &options)
        .context("this file system may not hold files that long: give another --dir")?;
    let block = show_size(formats::info(&image, None)?.block_size.into());
    let served = Served::blockd(dir.path(), &[Disk::new("disk", Kind::Vhdx.image(), image)])?;
    let mut link = Link::with_queues(&served.socket("disk")?, 1, POOL, 1)?;
    let opened = process::resident_bytes(served.pid())?;
    let driver = link.driver();
    let pattern = Pattern { random: true, access: Access::Write, block: PAGE, depth: 32 };
    let count = u64::from(ask.scale.places);
    let stride = driver.pages() / count;
    let mut places = (0..count).map(|n| n * stride);
    driver.run_while(&pattern, Wait::Sleep, |_, _| places.next())?;
    driver.flush(Wait::Sleep)?;
    driver.check(&pattern, (0..count).map(|n| n * stride))?;
    let used = process::resident_bytes(served.pid())?;
    table.row([format!("a VHDX of 64 TiB, blocks of {block}, opened"), mib(opened)]);
    table.row([format!("the same after {count} pages all over it were written and read"), mib(used)]);
    ask.figures.insert(format!("64 TiB, blocks of {block}"), json!({"opened": opened, "used": used}));
    let name = format!("a VHDX of 64 TiB with blocks of {block}");
    add_goal(ask, "memory", name, opened.max(used) as f64 / MIB as f64, 64.0);
    drop(link);
    served.stop()
}

fn add_goal(ask: &mut Ask<'_>, group: &str, what: String, mib: f64, most: f64) {
    let found = Spread::of([mib]).map(|found| Goal {
        group: group.into(),
        what,
        unit: " MiB",
        found,
        bound: Bound::AtMost(most),
    });
    ask.finding.goals.extend(found);
}

fn mib(bytes: u64) -> String {
    number(bytes as f64 / MIB as f64)
}
