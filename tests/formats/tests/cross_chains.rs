//! Chains that are made here hold the same for everybody who can read them: 7-Zip, libvhdi, dissect.hypervisor, vhd-lib and
//! blktap's vhd-util, each asked only what it is known to read rightly.
#![allow(clippy::unwrap_used, reason = "what fails in a helper of a test fails the test")]

mod cross;

use std::collections::BTreeMap;

use cross::{Disk, read_all};
use formats::{CreateOptions, Format, ImageType, OpenOptions, ZeroMode};
use formats_tests::readers;

const KIB: u32 = 1 << 10;
const MIB: u32 = 1 << 20;

/// A base and children on it, each with blocks of one of these sizes; every state on the way is read by all.
struct Plan {
    format: Format,
    base: ImageType,
    sector: u32,
    size: u64,
    base_block: Option<u32>,
    /// Names of the children, below the folder of the base, and their blocks.
    children: &'static [(&'static str, u32)],
}

fn carry_out(plan: &Plan, seed: u64) {
    let options = CreateOptions {
        image_type: plan.base,
        block_size: plan.base_block,
        logical_sector_size: plan.sector,
        ..CreateOptions::new(plan.format, plan.size)
    };
    let mut disk = Disk::new(&options, seed);
    disk.scribble(60);
    let mut agreed = BTreeMap::<&str, usize>::new();
    for (name, block) in plan.children {
        disk.grow_child(&format!("{name}.{}", plan.format), Some(*block), 0);
        disk.agree("as a new child");
        disk.scribble(50);
        disk.agree("written");
        disk.close();
        disk.sound(name);
        for who in disk.ask_others() {
            *agreed.entry(who).or_default() += 1;
        }
        disk.open();
        disk.agree("opened again");
    }
    println!(
        "{} with sectors of {} on a {} base, {} children: {agreed:?}",
        plan.format,
        plan.sector,
        plan.base,
        plan.children.len()
    );
}

#[test]
fn chains_of_vhds_read_the_same_everywhere() {
    let size = (21 << 20) + 7 * 512;
    let plan = Plan {
        format: Format::Vhd,
        base: ImageType::Dynamic,
        sector: 512,
        size,
        base_block: None,
        children: &[],
    };

    let plans = [
        Plan {
            children: &[
                ("disk-1", 2 * MIB),
                ("disk-2", 2 * MIB),
                ("disk-3", 2 * MIB),
                ("disk-4", 2 * MIB),
                ("disk-5", 2 * MIB),
            ],
            base_block: Some(2 * MIB),
            ..plan
        },
        Plan {
            children: &[("disk-1", 512 * KIB), ("disk-2", 512 * KIB)],
            base_block: Some(512 * KIB),
            ..plan
        },
        Plan { children: &[("disk-1", 2 * MIB), ("disk-2", 512 * KIB), ("disk-3", 2 * MIB)], ..plan },
        Plan { children: &[("disk-1", 2 * MIB), ("disk-2", 2 * MIB)], base: ImageType::Fixed, ..plan },
    ];
    for (seed, plan) in plans.iter().enumerate() {
        carry_out(plan, seed as u64);
    }
}

#[test]
fn chains_of_vhdxs_read_the_same_everywhere() {
    let plan = Plan {
        format: Format::Vhdx,
        base: ImageType::Dynamic,
        sector: 512,
        size: (21 << 20) + 7 * 4096,
        base_block: Some(MIB),
        children: &[],
    };
    let plans = [
        Plan {
            children: &[("disk-1", MIB), ("disk-2", MIB), ("disk-3", MIB), ("disk-4", MIB), ("disk-5", MIB)],
            ..plan
        },
        Plan {
            children: &[("disk-1", 2 * MIB), ("disk-2", 4 * MIB), ("disk-3", MIB)],
            base_block: Some(32 * MIB),
            ..plan
        },
        Plan { children: &[("disk-1", 2 * MIB)], base: ImageType::Fixed, ..plan },
        Plan { children: &[("disk-1", MIB), ("disk-2", 2 * MIB)], sector: 4096, ..plan },
        Plan {
            children: &[("disk-1", 2 * MIB), ("disk-2", 2 * MIB), ("disk-3", 8 * MIB)],
            sector: 4096,
            size: 20 << 20,
            ..plan
        },
    ];
    for (seed, plan) in plans.iter().enumerate() {
        carry_out(plan, 100 + seed as u64);
    }
}

#[test]
fn children_in_other_folders_find_their_parents_everywhere() {
    for (format, block) in [(Format::Vhd, 2 * MIB), (Format::Vhdx, MIB)] {
        let options =
            CreateOptions { block_size: Some(block), ..CreateOptions::new(format, (9 << 20) + 4096) };
        let mut disk = Disk::new(&options, 7);
        disk.scribble(30);
        for name in ["snapshots/one", "snapshots/deep er/twö", "else where/three"] {
            disk.grow_child(&format!("{name}.{format}"), Some(block), 0);
            disk.scribble(20);
        }
        disk.agree("in four folders");
        disk.close();
        disk.sound("in four folders");
        println!("{format} in several folders: {:?}", disk.ask_others());
    }
}

#[test]
fn children_of_another_size_read_the_same_where_that_is_known() {
    for format in [Format::Vhd, Format::Vhdx] {
        let block = Some(2 * MIB);
        let options = CreateOptions { block_size: block, ..CreateOptions::new(format, 14 << 20) };
        let mut disk = Disk::new(&options, 8);
        disk.scribble(40);
        // A parent that is larger is clipped. Children are made as large as their parents, and cut then.
        disk.grow_child(&format!("disk-1.{format}"), block, 0);
        disk.zero(9 << 20, 5 << 20, ZeroMode::Unmap);
        disk.close();
        formats::resize_with_parents(disk.top(), None, 9 << 20, true, &[disk.folder.path().into()]).unwrap();
        disk.model.truncate(9 << 20);
        disk.open();
        disk.agree("smaller than its parent, unwritten");
        disk.scribble(20);
        disk.agree("smaller than its parent");
        disk.close();
        disk.sound("smaller than its parent");
        println!("{format}, smaller than its parent: {:?}", disk.ask_others());
        disk.open();
        // What a parent lacks is zeroes. The others read such chains wrongly, or not at all.
        disk.grow_child(&format!("disk-2.{format}"), block, (12 << 20) + 4096);
        disk.agree("larger than its parent, unwritten");
        disk.scribble(20);
        disk.agree("larger than its parent");
        disk.close();
        disk.sound("larger than its parent");
    }
}

#[test]
fn children_that_vhd_lib_merges_into_their_parents_leave_the_same_disk() {
    let block = Some(2 * MIB);
    let options = CreateOptions { block_size: block, ..CreateOptions::new(Format::Vhd, (17 << 20) + 512) };
    for children in [1, 2] {
        let mut disk = Disk::new(&options, 30 + children);
        disk.scribble(40);
        for n in 1..=children {
            disk.grow_child(&format!("disk-{n}.vhd"), block, 0);
            disk.scribble(40);
        }
        disk.close();
        let Some(merged) = readers::vhd_lib_merge(&disk.chain[0], &disk.chain[1]) else { return };
        merged.unwrap();
        disk.chain.remove(0);
        let image = formats::open(disk.top(), &disk.open_options(true)).unwrap();
        disk.assert_same(&read_all(&*image), "merged by vhd-lib");
        drop(image);
        // It goes on here.
        disk.open();
        disk.scribble(20);
        disk.agree("written after the merge");
        disk.close();
        disk.sound("written after the merge");
    }
}

#[test]
fn a_flattened_chain_is_the_same_disk() {
    for (format, sector) in [(Format::Vhd, 512), (Format::Vhdx, 512), (Format::Vhdx, 4096)] {
        let options = CreateOptions {
            block_size: Some(2 * MIB),
            logical_sector_size: sector,
            ..CreateOptions::new(format, 12 << 20)
        };
        let mut disk = Disk::new(&options, 9);
        disk.scribble(30);
        disk.grow_child(&format!("disk-1.{format}"), Some(2 * MIB), 0);
        disk.scribble(30);
        disk.close();
        let chain = formats::open(disk.top(), &disk.open_options(true)).unwrap();
        let path = disk.folder.path().join(format!("flat.{format}"));
        formats::create(&path, &options).unwrap();
        let flat = formats::open(&path, &OpenOptions::default()).unwrap();
        formats::copy(&*chain, &*flat, &mut |_| std::ops::ControlFlow::Continue(())).unwrap();
        flat.close().unwrap();
        drop((chain, flat));
        disk.chain = vec![path];
        disk.sound("flattened");
        println!("{format} with sectors of {sector}, flattened: {:?}", disk.ask_others());
    }
}
