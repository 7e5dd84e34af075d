//! `image info`, `image check` and `image map`: looking at an image without changing it (but for `--repair`).

use std::collections::BTreeMap;

use clap::Args;
use formats::{AllocState, CheckReport, Finding, Format, ImageInfo, ImageState, Severity};
use serde::Serialize;

use super::{Existing, Parents, open, settle};
use crate::failure::{Exit, Failure};
use crate::render::{self, Facts, Screen, Table};

/// Show what an image is
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl image info disk.vhdx
  blockctl image info child.vhdx --parents /srv/base")]
pub(crate) struct InfoArgs {
    #[command(flatten)]
    image: Existing,
    #[command(flatten)]
    parents: Parents,
}

/// Look for damage
#[derive(Debug, Args)]
#[command(after_help = "Examples:
  blockctl image check disk.vhdx
  blockctl image check disk.vhdx --repair
  blockctl image check child.vhdx --parents /srv/base

With --parents, the parents are checked too. Ends with 0 when the image is sound and with 4 when it is damaged.")]
pub(crate) struct CheckArgs {
    #[command(flatten)]
    image: Existing,
    /// Mend what can be mended without guessing; parents are left as they are
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    parents: Parents,
}

/// Show which ranges are allocated, zero or absent
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  blockctl image map disk.vhdx --json")]
pub(crate) struct MapArgs {
    #[command(flatten)]
    image: Existing,
    #[command(flatten)]
    parents: Parents,
}

/// `blockctl image info`
pub(crate) fn info(args: &InfoArgs, screen: Screen) -> Result<Exit, Failure> {
    let format = args.image.format.map(Format::from);
    let info = formats::info_with_parents(&args.image.path, format, &args.parents.parents)?;
    screen.show(&info, |info| render_info(&args.image, info))?;
    Ok(Exit::Done)
}

fn render_info(image: &Existing, info: &ImageInfo) -> String {
    let mut facts = Facts::new();
    facts.add("image", image.path.display().to_string());
    if let Some(job) = &info.incomplete_move {
        facts.add("WARNING", format!("the unfinished target of move {job}; not a disk to use"));
    }
    let state = match info.state {
        ImageState::Clean => "clean",
        ImageState::DirtyLog => "its log holds changes, which the next opening for writing applies",
        ImageState::NeedsRepair => "needs a repair: `blockctl image check --repair`",
    };
    let in_use = if info.in_use { "yes, so that what stands here may be out of date" } else { "no" };
    let block_size = if info.block_size == 0 { String::new() } else { render::size(info.block_size.into()) };
    facts
        .add("format", format!("{} {}", info.image_type, info.format))
        .add("virtual size", render::size_exact(info.virtual_size))
        .add("allocated", render::size_exact(info.allocated_bytes))
        .add("on disk", render::size_exact(info.disk_usage))
        .add("block size", block_size)
        .add(
            "sector size",
            format!("{} logical, {} physical", info.logical_sector_size, info.physical_sector_size),
        )
        .add("state", state)
        .add("open for writing", in_use)
        .add("creator", info.creator.clone().unwrap_or_default())
        .add("parent", info.parent_paths.iter().map(|path| shown_text(path)).collect::<Vec<_>>().join(", "));
    for parent in &info.parents {
        let id = parent.id.as_deref().unwrap_or("no id");
        facts.add(
            "found",
            match (&parent.path, &parent.reason) {
                (Some(path), _) => format!("{path} ({id})"),
                (None, reason) => format!("NOT: {id}: {}", reason.as_deref().unwrap_or("no reason is known")),
            },
        );
    }
    for (name, id) in &info.ids {
        facts.add(&name.replace('_', " "), id);
    }
    facts.render()
}

/// A text of an image, with nothing in it that acts on a terminal.
fn shown_text(text: &str) -> String {
    text.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// What a check found, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Checked<'a> {
    path: String,
    sound: bool,
    findings: &'a [Finding],
}

/// `blockctl image check`
pub(crate) fn check(args: &CheckArgs, screen: Screen) -> Result<Exit, Failure> {
    let (path, format) = (&args.image.path, args.image.format.map(Format::from));
    if args.repair {
        settle(path, format)?;
    }
    let report = match &args.parents.parents[..] {
        [] => formats::check(path, format, args.repair)?,
        parents => formats::check_with_parents(path, format, args.repair, parents)?,
    };
    let path = args.image.path.display().to_string();
    let shown = Checked { path, sound: report.is_sound(), findings: &report.findings };
    screen.show(&shown, |shown| render_check(&shown.path, &report))?;
    Ok(if report.is_sound() { Exit::Done } else { Exit::Different })
}

fn render_check(path: &str, report: &CheckReport) -> String {
    let mut text = String::new();
    for finding in &report.findings {
        let severity = match finding.severity {
            Severity::Note => "note",
            Severity::Warning => "warning",
            Severity::Damage => "damage",
        };
        let place = finding.offset.map(|at| format!(" at {at}")).unwrap_or_default();
        let outcome = match (finding.repaired, finding.repairable) {
            (true, _) => " (repaired)",
            (false, true) => " (--repair can mend this)",
            (false, false) => "",
        };
        let Finding { structure, message, code, .. } = finding;
        text.push_str(&format!("{severity}: {structure}{place}: {message} [{code}]{outcome}\n"));
    }
    text.push_str(&match (report.is_sound(), report.findings.is_empty()) {
        (true, true) => format!("{path}: sound\n"),
        (true, false) => format!("{path}: sound, with the remarks above\n"),
        (false, _) => format!("{path}: damaged\n"),
    });
    text
}

/// The map, as `--json` prints it.
#[derive(Debug, Serialize)]
struct Mapped {
    path: String,
    size_bytes: u64,
    extents: Vec<MappedExtent>,
}

#[derive(Debug, Serialize)]
struct MappedExtent {
    offset: u64,
    length: u64,
    state: AllocState,
}

/// `blockctl image map`
pub(crate) fn map(args: &MapArgs, screen: Screen) -> Result<Exit, Failure> {
    let image = open(&args.image.path, args.image.format, &args.parents)?;
    let mut extents: Vec<MappedExtent> = Vec::new();
    let mut offset = 0;
    while let Some(extent) = image.next_extent(offset)? {
        assert!(extent.span.len > 0, "an extent has a length");
        offset += extent.span.len;
        match extents.last_mut() {
            Some(last) if last.state == extent.state => last.length += extent.span.len,
            _ => extents.push(MappedExtent {
                offset: extent.span.offset,
                length: extent.span.len,
                state: extent.state,
            }),
        }
    }
    let path = args.image.path.display().to_string();
    let shown = Mapped { path, size_bytes: image.geometry().virtual_size, extents };
    screen.show(&shown, render_map)?;
    Ok(Exit::Done)
}

fn state_name(state: AllocState) -> &'static str {
    match state {
        AllocState::Data => "allocated",
        AllocState::Zero => "zero",
        AllocState::Absent => "absent",
    }
}

fn render_map(map: &Mapped) -> String {
    let mut table = Table::new(&[">OFFSET", ">LENGTH", "STATE"]);
    let mut totals = BTreeMap::new();
    for extent in &map.extents {
        let state = state_name(extent.state);
        *totals.entry(state).or_insert(0u64) += extent.length;
        table.row([extent.offset.to_string(), extent.length.to_string(), state.into()]);
    }
    let totals: Vec<String> =
        totals.iter().map(|(state, bytes)| format!("{} {state}", render::size(*bytes))).collect();
    format!("{}{} in all: {}\n", table.render(), render::size(map.size_bytes), totals.join(", "))
}
