//! Requests for each second of processor time as disks or queues are added.

use anyhow::Result;
use serde_json::json;

use crate::choice::Common;
use crate::drive::{Access, Driver, Link, PAGE, Pattern, run_together};
use crate::plot::{Chart, Group};
use crate::served::{Disk, Served};
use crate::size::{MIB, show_size};
use crate::spread::{Bound, Goal, Spread, maybe_spread};
use crate::table::Table;
use crate::{choice::Kind, interrupt};

use super::{Ask, doubling};

/// Bytes of each disk.
pub const SIZE: u64 = 16 * MIB;
/// Bytes for the data of each queue's requests.
const POOL: u64 = 256 << 10;
const PATTERN: Pattern = Pattern { random: true, access: Access::Read, block: PAGE, depth: 16 };

/// Rounds of one count.
struct Line {
    count: u32,
    rates: Vec<f64>,
    per_cpu_s: Vec<f64>,
}

/// 1 to 64 disks of one daemon, each with a thread of its own.
pub fn disks(ask: &mut Ask<'_>) -> Result<()> {
    let dir = Common::folder_in(&ask.common.memory_dir())?;
    let mut disks = Vec::new();
    for n in 0..ask.scale.disks {
        let image = dir.path().join(format!("{n}.raw"));
        crate::server::create(Kind::Raw.image(), &image, SIZE)?;
        disks.push(Disk::new(format!("{n}"), Kind::Raw.image(), image));
    }
    let served = Served::blockd(dir.path(), &disks)?;
    let mut links = Vec::new();
    for disk in &disks {
        let mut link = Link::with_queues(&served.socket(&disk.id)?, 1, POOL, links.len() as u64)?;
        let driver = link.driver();
        let pattern = Pattern { access: Access::Write, random: false, ..PATTERN };
        let mut places = 0..driver.pages();
        driver.run_while(&pattern, crate::drive::Wait::Sleep, |_, _| places.next())?;
        links.push(link);
    }
    let mut drivers: Vec<&mut Driver> = links.iter_mut().map(Link::driver).collect();
    let lines = measure(ask, &served, &mut drivers, ask.scale.disks, "disks")?;
    show(ask, "disks", &lines);
    drop(links);
    served.stop()
}

/// 1 to 8 queues of one disk, each with a thread of its own.
pub fn queues(ask: &mut Ask<'_>) -> Result<()> {
    let dir = Common::folder_in(&ask.common.memory_dir())?;
    let image = dir.path().join("disk.raw");
    crate::server::create(Kind::Raw.image(), &image, SIZE * 8)?;
    let queues = ask.scale.queues as usize;
    let disk = Disk { queues, ..Disk::new("disk", Kind::Raw.image(), image) };
    let served = Served::blockd(dir.path(), std::slice::from_ref(&disk))?;
    let mut link = Link::with_queues(&served.socket("disk")?, queues, POOL, 1)?;
    let pattern = Pattern { access: Access::Write, random: false, ..PATTERN };
    let mut places = 0..link.driver().pages();
    link.driver().run_while(&pattern, crate::drive::Wait::Sleep, |_, _| places.next())?;
    let mut drivers: Vec<&mut Driver> = link.drivers.iter_mut().collect();
    let lines = measure(ask, &served, &mut drivers, ask.scale.queues, "queues of one disk")?;
    show(ask, "queues of one disk", &lines);
    drop(link);
    served.stop()
}

fn measure(
    ask: &Ask<'_>,
    served: &Served,
    drivers: &mut [&mut Driver],
    most: u32,
    what: &str,
) -> Result<Vec<Line>> {
    let line = |count| Line { count, rates: Vec::new(), per_cpu_s: Vec::new() };
    let mut lines: Vec<Line> = doubling(most).into_iter().map(line).collect();
    for round in 0..ask.effort.rounds {
        eprintln!("1 to {most} {what}, round {} ...", round + 1);
        for line in &mut lines {
            interrupt::check()?;
            let before = served.cpu_s()?;
            let drove = run_together(&mut drivers[..line.count as usize], &PATTERN, ask.effort.time())?;
            line.rates.push(drove.requests as f64 / drove.time.as_secs_f64());
            line.per_cpu_s.push(drove.requests as f64 / (served.cpu_s()? - before));
        }
    }
    Ok(lines)
}

fn show(ask: &mut Ask<'_>, what: &str, lines: &[Line]) {
    let header = [what, "requests/s", "requests per CPU s", "per CPU s, relative to 1"];
    let mut table = Table::new(0, header);
    let mut groups = Vec::new();
    for line in lines {
        let relative = Spread::of_ratios(&line.per_cpu_s, &lines[0].per_cpu_s);
        table.row([
            line.count.to_string(),
            maybe_spread(Spread::of(line.rates.iter().copied())),
            maybe_spread(Spread::of(line.per_cpu_s.iter().copied())),
            maybe_spread(relative),
        ]);
        groups.push(Group { label: line.count.to_string(), bars: vec![relative], bound: Bound::None });
        if line.count > 1 {
            let name = format!("requests per CPU s, {} ÷ 1", line.count);
            ask.finding.goals.extend(Goal::ratio(what, name, relative, Bound::None));
        }
    }
    let heading = format!(
        "1 to {} {what}: random 4 KiB reads, depth {} each, raw images of {} in memory, one front end that polls",
        lines.last().map_or(1, |line| line.count),
        PATTERN.depth,
        show_size(if what == "disks" { SIZE } else { SIZE * 8 })
    );
    ask.finding.tables.push((heading, table));
    let title = format!("Requests per second of the daemon's CPU time with more {what}, relative to 1");
    ask.finding.charts.extend(Chart::new(title, "ratio, more is better", vec!["blockd".into()], groups));
    let figures = lines.iter().map(|line| {
        json!({"count": line.count, "requests_per_s": line.rates, "requests_per_cpu_s": line.per_cpu_s})
    });
    ask.figures.insert(what.into(), figures.collect());
}
