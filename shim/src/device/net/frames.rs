//! Ethernet frames that tell where a guest is, and what a guest's own frames tell of its addresses.

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Shortest frame without its checksum (IEEE 802.3).
const FRAME_MIN: usize = 60;
/// Most addresses of a guest that are remembered, of each kind.
pub const ADDRESSES_MAX: usize = 8;

const TYPE_IPV4: u16 = 0x0800;
const TYPE_ARP: u16 = 0x0806;
const TYPE_RARP: u16 = 0x8035;
const OP_ARP_REQUEST: u16 = 1;
const OP_RARP_REQUEST: u16 = 3;
/// Hardware address of the interface that everybody listens to.
const BROADCAST: [u8; 6] = [0xff; 6];

/// The address of a network card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Mac(pub [u8; 6]);

impl std::fmt::Display for Mac {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::str::FromStr for Mac {
    type Err = String;

    /// Six bytes in hexadecimal with colons between, not all zero and not that of a group.
    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no MAC address; one looks like 52:54:00:12:34:56");
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|part| part.len() == 2).ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() || bytes == [0; 6] {
            return Err(wrong());
        }
        if bytes[0] & 1 != 0 {
            return Err(format!("{text:?} is the address of a group; a card's first byte is even"));
        }
        Ok(Self(bytes))
    }
}

/// An ARP or RARP frame to everybody (RFC 826, RFC 903).
fn frame(kind: u16, operation: u16, mac: Mac, sender: Ipv4Addr, target: (&[u8; 6], Ipv4Addr)) -> Vec<u8> {
    let mut frame = Vec::with_capacity(FRAME_MIN);
    frame.extend(BROADCAST);
    frame.extend(mac.0);
    frame.extend(kind.to_be_bytes());
    // Ethernet, IPv4, and the lengths of their addresses.
    frame.extend([0, 1, 8, 0, 6, 4]);
    frame.extend(operation.to_be_bytes());
    frame.extend(mac.0);
    frame.extend(sender.octets());
    frame.extend(target.0);
    frame.extend(target.1.octets());
    frame.resize(FRAME_MIN, 0);
    frame
}

/// The frames that tell a network where the guest is now: a RARP request, by which switches learn the card's place, and for
/// each of the guest's addresses a gratuitous ARP request, by which its neighbours do.
pub fn announcement(mac: Mac, addresses: &[Ipv4Addr]) -> Vec<Vec<u8>> {
    let nowhere = Ipv4Addr::UNSPECIFIED;
    let rarp = frame(TYPE_RARP, OP_RARP_REQUEST, mac, nowhere, (&mac.0, nowhere));
    let arps =
        addresses.iter().map(|address| frame(TYPE_ARP, OP_ARP_REQUEST, mac, *address, (&[0; 6], *address)));
    std::iter::once(rarp).chain(arps).collect()
}

/// What is known of a guest's addresses, from what it sends.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Addresses {
    /// Addresses that it said are its own, by ARP.
    said: Vec<Ipv4Addr>,
    /// Addresses that it sent from. A guest that forwards also sends from those of others.
    used: Vec<Ipv4Addr>,
}

impl Addresses {
    /// The addresses to announce: those that the guest itself calls its own, and only if it has named none, the one that it
    /// sent from, if that was one only. Whoever announces the address of another takes that one's traffic away.
    pub fn own(&self) -> Vec<Ipv4Addr> {
        match (self.said.as_slice(), self.used.as_slice()) {
            ([], [only]) => vec![*only],
            (said, _) => said.to_vec(),
        }
    }

    /// Looks at a frame that the guest sends, which may be anything.
    pub fn look_at(&mut self, mac: Mac, frame: &[u8]) {
        let (Some(source), Some(kind)) = (frame.get(6..12), frame.get(12..14)) else { return };
        if source != mac.0 {
            return;
        }
        match u16::from_be_bytes([kind[0], kind[1]]) {
            TYPE_ARP => {
                // Ethernet and IPv4, and a sender that is this card.
                let header = frame.get(14..20);
                if header == Some(&[0, 1, 8, 0, 6, 4]) && frame.get(22..28) == Some(&mac.0) {
                    remember(&mut self.said, address_at(frame, 28));
                }
            }
            TYPE_IPV4 if frame.get(14).is_some_and(|byte| byte >> 4 == 4) => {
                remember(&mut self.used, address_at(frame, 26));
            }
            _ => {}
        }
    }

    /// Whether no more is remembered than there is room for.
    pub fn is_bounded(&self) -> bool {
        self.said.len() <= ADDRESSES_MAX && self.used.len() <= ADDRESSES_MAX
    }
}

fn address_at(frame: &[u8], at: usize) -> Option<Ipv4Addr> {
    let bytes: [u8; 4] = frame.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(bytes))
        .filter(|a| !a.is_unspecified() && !a.is_multicast() && !a.is_broadcast() && !a.is_loopback())
}

/// The newest are kept.
fn remember(addresses: &mut Vec<Ipv4Addr>, address: Option<Ipv4Addr>) {
    let Some(address) = address.filter(|address| !addresses.contains(address)) else { return };
    if addresses.len() == ADDRESSES_MAX {
        addresses.remove(0);
    }
    addresses.push(address);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: Mac = Mac([0x52, 0x54, 0, 1, 2, 3]);
    const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 7);

    fn ipv4_from(address: Ipv4Addr) -> Vec<u8> {
        let mut frame = vec![0; 60];
        frame[6..12].copy_from_slice(&MAC.0);
        frame[12..15].copy_from_slice(&[8, 0, 0x45]);
        frame[26..30].copy_from_slice(&address.octets());
        frame
    }

    #[test]
    fn a_rarp_names_the_card_twice_and_no_address() {
        let frames = announcement(MAC, &[]);
        assert_eq!(frames.len(), 1);
        let mut expected = vec![0xff; 6];
        expected.extend(MAC.0);
        expected.extend([0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
        expected.extend(MAC.0);
        expected.extend([0; 4]);
        expected.extend(MAC.0);
        expected.extend([0; 4]);
        expected.resize(60, 0);
        assert_eq!(frames[0], expected);
    }

    #[test]
    fn a_gratuitous_arp_asks_for_its_own_address() {
        let frames = announcement(MAC, &[ADDRESS]);
        assert_eq!(frames.len(), 2);
        let arp = &frames[1];
        assert_eq!(arp.len(), 60);
        assert_eq!(arp[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
        assert_eq!((&arp[28..32], &arp[38..42]), (&ADDRESS.octets()[..], &ADDRESS.octets()[..]));
    }

    #[test]
    fn an_address_is_learned_from_arp_and_preferred_to_what_was_sent_from() {
        let mut addresses = Addresses::default();
        addresses.look_at(MAC, &ipv4_from(Ipv4Addr::new(10, 0, 0, 9)));
        assert_eq!(addresses.own(), [Ipv4Addr::new(10, 0, 0, 9)]);
        addresses.look_at(MAC, &announcement(MAC, &[ADDRESS])[1]);
        assert_eq!(addresses.own(), [ADDRESS]);
    }

    #[test]
    fn a_guest_that_forwards_is_not_taken_for_those_whose_traffic_it_forwards() {
        let mut addresses = Addresses::default();
        for last in 1..100 {
            addresses.look_at(MAC, &ipv4_from(Ipv4Addr::new(10, 0, 0, last)));
        }
        assert!(addresses.own().is_empty());
        assert!(addresses.is_bounded());
        addresses.look_at(MAC, &announcement(Mac([2; 6]), &[ADDRESS])[1]);
        addresses.look_at(MAC, &announcement(MAC, &[Ipv4Addr::UNSPECIFIED])[1]);
        addresses.look_at(MAC, &announcement(MAC, &[])[0]);
        assert!(addresses.own().is_empty());
    }

    #[test]
    fn mac_addresses_are_read_and_written_alike() {
        assert_eq!("52:54:00:01:02:03".parse(), Ok(MAC));
        assert_eq!(MAC.to_string(), "52:54:00:01:02:03");
        for wrong in [
            "",
            "52:54:00:01:02",
            "52:54:00:01:02:03:04",
            "52:54:00:01:02:0g",
            "00:00:00:00:00:00",
            "5:54:00:01:02:033",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert!("53:54:00:01:02:03".parse::<Mac>().unwrap_err().contains("group"));
    }

    proptest! {
        #[test]
        fn no_frame_is_too_odd_to_be_looked_at(frame in prop::collection::vec(any::<u8>(), 0..80), own: bool) {
            let mut frame = frame;
            if own && frame.len() > 12 {
                frame[6..12].copy_from_slice(&MAC.0);
            }
            let mut addresses = Addresses::default();
            addresses.look_at(MAC, &frame);
            prop_assert!(addresses.is_bounded());
        }
    }
}
