//! `--disk socket=PATH,serial=ID`, `--tap NAME,mac=..`, `--console file=PATH`, `--tls ca=..,cert=..,key=..`.

use std::path::PathBuf;
use std::str::FromStr;

use crate::device::net::Mac;

/// Most queues of a disk.
const QUEUES_MAX: u16 = 64;

/// A disk that blockd serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskArgument {
    /// Where blockd listens for front ends.
    pub socket: PathBuf,
    /// What tells it from the machine's other disks; the socket's file name if none is given.
    pub serial: String,
    /// Queues that the guest is offered, at most; fewer if blockd has fewer.
    pub queues: u16,
    /// blockd's API and the disk's name there, for handing the image over when the machine moves.
    pub blockd: Option<(PathBuf, String)>,
}

/// A network card on a tap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TapArgument {
    /// The tap's name.
    pub name: String,
    /// The guest's address.
    pub mac: Mac,
}

/// Where the serial line leads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ConsoleArgument {
    /// Nowhere.
    Off,
    /// Standard input and output.
    Stdio,
    /// A file that is appended to.
    File(PathBuf),
}

/// Files for mutual TLS, PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsArgument {
    /// Who signs the certificates of both sides.
    pub ca: PathBuf,
    /// This side's certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// The name that the other side's certificate must have, if it is not the host's in its address.
    pub name: Option<String>,
}

/// `key=value,...`, the values without commas. `bare` is what a first part without `=` is called.
fn pairs<'a>(text: &'a str, bare: Option<&'a str>) -> Result<Vec<(&'a str, &'a str)>, String> {
    text.split(',')
        .enumerate()
        .map(|(i, part)| match (part.split_once('='), bare) {
            (Some(pair), _) => Ok(pair),
            (None, Some(bare)) if i == 0 => Ok((bare, part)),
            _ => Err(format!("{part} is not like KEY=VALUE")),
        })
        .collect()
}

fn unknown<T>(key: &str, known: &str) -> Result<T, String> {
    Err(format!("{key} is not known here; there are {known}"))
}

impl FromStr for DiskArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut socket, mut serial, mut queues, mut api, mut id) = (None, None, 1, None, None);
        for (key, value) in pairs(text, None)? {
            match key {
                "socket" => socket = Some(PathBuf::from(value)),
                "serial" => serial = Some(value.to_owned()),
                "queues" => {
                    let number = value.parse().ok().filter(|n| (1..=QUEUES_MAX).contains(n));
                    queues = number.ok_or_else(|| format!("queues={value}: a disk has 1 to {QUEUES_MAX}"))?;
                }
                "blockd" => api = Some(PathBuf::from(value)),
                "id" => id = Some(value.to_owned()),
                _ => return unknown(key, "socket, serial, queues, blockd and id"),
            }
        }
        let socket = socket.ok_or("a disk needs socket=PATH, where blockd listens for it")?;
        let name = socket.file_stem().map(|name| name.to_string_lossy().into_owned());
        let blockd = match (api, id) {
            (Some(api), Some(id)) => Some((api, id)),
            (None, None) => None,
            _ => return Err("blockd=API-SOCKET and id=DISK belong together".into()),
        };
        Ok(Self { socket, serial: serial.or(name).unwrap_or_else(|| "disk".into()), queues, blockd })
    }
}

impl FromStr for TapArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut name, mut mac) = (None, None);
        for (key, value) in pairs(text, Some("name"))? {
            match key {
                "name" => name = Some(value.to_owned()),
                "mac" => mac = Some(value.parse::<Mac>().map_err(|e| format!("mac={value}: {e}"))?),
                _ => return unknown(key, "mac"),
            }
        }
        let name =
            name.filter(|n| !n.is_empty() && n.len() < 16).ok_or("a tap has a name of 1 to 15 letters")?;
        Ok(Self { name, mac: mac.ok_or("a network card needs mac=XX:XX:XX:XX:XX:XX")? })
    }
}

impl FromStr for ConsoleArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.split_once('=')) {
            ("off", _) => Ok(Self::Off),
            ("stdio", _) => Ok(Self::Stdio),
            (_, Some(("file", path))) if !path.is_empty() => Ok(Self::File(path.into())),
            _ => Err(format!("{text} is no console; there are off, stdio and file=PATH")),
        }
    }
}

impl FromStr for TlsArgument {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (mut ca, mut cert, mut key_file, mut name) = (None, None, None, None);
        for (key, value) in pairs(text, None)? {
            match key {
                "ca" => ca = Some(PathBuf::from(value)),
                "cert" => cert = Some(PathBuf::from(value)),
                "key" => key_file = Some(PathBuf::from(value)),
                "name" => name = Some(value.to_owned()),
                _ => return unknown(key, "ca, cert, key and name"),
            }
        }
        match (ca, cert, key_file) {
            (Some(ca), Some(cert), Some(key)) => Ok(Self { ca, cert, key, name }),
            _ => Err("TLS needs ca=FILE,cert=FILE,key=FILE: both sides show a certificate".into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_named_by_its_socket_unless_it_has_a_serial_number() {
        let disk: DiskArgument = "socket=/run/vda.sock".parse().expect("a disk");
        assert_eq!((disk.serial.as_str(), disk.queues, disk.blockd), ("vda", 1, None));
        let disk: DiskArgument = "socket=/s,serial=root,queues=4,blockd=/api,id=d".parse().expect("a disk");
        assert_eq!((disk.serial.as_str(), disk.queues), ("root", 4));
        assert_eq!(disk.blockd, Some(("/api".into(), "d".into())));
        for wrong in ["", "serial=x", "socket=/s,queues=0", "socket=/s,id=d", "socket=/s,colour=red"] {
            assert!(wrong.parse::<DiskArgument>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_tap_has_a_name_and_an_address() {
        let tap: TapArgument = "tap0,mac=52:54:00:12:34:56".parse().expect("a tap");
        assert_eq!((tap.name.as_str(), tap.mac.to_string().as_str()), ("tap0", "52:54:00:12:34:56"));
        for wrong in [
            "tap0",
            "tap0,mac=1:2",
            "tap0,mac=01:00:00:00:00:00",
            "a-name-that-is-too-long,mac=52:54:00:12:34:56",
        ] {
            assert!(wrong.parse::<TapArgument>().is_err(), "{wrong}");
        }
    }
}
