//! Telling a child where its parent is.

use formats::vhdx::{Vhdx, inspect, relink};
use formats::{ErrorKind, ImageType, NewParentLink, Storage};

use crate::image::{MIB, PARTIAL, Taken, bytes, create, link, own, place_block, shared, sound};

fn text_of(locator: &[u8]) -> String {
    let units: Vec<u16> =
        locator.chunks_exact(2).map(|c| u16::from_le_bytes([c[0], c[1]])).filter(|u| *u < 128).collect();
    String::from_utf16(&units).unwrap()
}

#[test]
fn a_child_names_its_new_parent_and_holds_what_it_held() {
    let parent = bytes(0x50, 4 * MIB);
    let sim = create(ImageType::Differencing, 4 * MIB, 512);
    place_block(&sim, 1, PARTIAL, &bytes(1, MIB));
    own(&sim, 2048..2049);
    let before = Taken::of(&sim);
    // Longer, shorter, much longer, and back.
    for name in ["a-much-longer-name-than-before.vhdx", "b", &"deep/".repeat(700), "base.vhdx"] {
        relink(&shared(&sim), &link(name)).unwrap();
        let after = Taken::of(&sim);
        let paths = inspect(&shared(&sim)).unwrap().parent_paths;
        assert!(paths.iter().any(|p| *p == format!("..\\{}", name.replace('/', "\\"))), "{paths:?}");
        assert_eq!(after.data_write, before.data_write);
        assert!(after.content(&parent) == before.content(&parent));
        sound(&sim).unwrap();
    }
    assert_eq!(Taken::of(&sim).locator, before.locator);
    let trace = sim.trace_len();
    relink(&shared(&sim), &link("base.vhdx")).unwrap();
    assert_eq!(sim.trace_len(), trace, "the same words change nothing");
}

#[test]
fn a_second_id_is_named_while_the_parent_is_written_to() {
    let sim = create(ImageType::Differencing, 4 * MIB, 512);
    let next = "11111111-2222-4333-8444-555555555555".parse().unwrap();
    relink(&shared(&sim), &NewParentLink { next_id: Some(next), ..link("p.vhdx") }).unwrap();
    let text = text_of(&Taken::of(&sim).locator);
    assert!(
        text.contains("parent_linkage2") && text.contains("{11111111-2222-4333-8444-555555555555}"),
        "{text}"
    );
    relink(&shared(&sim), &link("p.vhdx")).unwrap();
    assert!(!text_of(&Taken::of(&sim).locator).contains("parent_linkage2"));
}

#[test]
fn what_has_no_parent_is_not_given_one() {
    let sim = create(ImageType::Dynamic, 4 * MIB, 512);
    let before = sim.contents().fingerprint();
    let refused = relink(&shared(&sim), &link("p.vhdx")).unwrap_err();
    assert_eq!(refused.kind, ErrorKind::InvalidParameter, "{refused}");
    assert_eq!(sim.contents().fingerprint(), before);
    assert!(Vhdx::open(shared(&sim), false).is_ok());
    assert!(sim.len().unwrap() > 0);
}
