//! GUIDs as the file stores them.

use std::fmt;

use uuid::Uuid;

/// A GUID in the byte order of the file (the first three fields little-endian).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, PartialOrd, Ord)]
pub struct Guid(pub [u8; 16]);

impl Guid {
    /// All zeroes: "none".
    pub const ZERO: Self = Self([0; 16]);

    /// The GUID that is written as these 32 hexadecimal digits.
    pub(super) const fn from_digits(digits: u128) -> Self {
        Self(Uuid::from_u128(digits).to_bytes_le())
    }

    /// A new random one, never zero.
    pub fn random() -> Self {
        Self(Uuid::new_v4().to_bytes_le())
    }

    /// Whether it is all zeroes.
    pub fn is_zero(&self) -> bool {
        *self == Self::ZERO
    }

    /// Reads the text form, with or without braces.
    pub fn parse(text: &str) -> Option<Self> {
        let inner = match text.strip_prefix('{') {
            Some(rest) => rest.strip_suffix('}')?,
            None => text,
        };
        Uuid::try_parse(inner).ok().map(|uuid| Self(uuid.to_bytes_le()))
    }
}

impl fmt::Display for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Uuid::from_bytes_le(self.0).hyphenated().fmt(f)
    }
}

impl fmt::Debug for Guid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_three_fields_are_stored_little_endian() {
        let guid = Guid::from_digits(0x2DC27766_F623_4200_9D64_115E9BFD4A08);
        assert_eq!(guid.0[..8], [0x66, 0x77, 0xC2, 0x2D, 0x23, 0xF6, 0x00, 0x42]);
        assert_eq!(guid.to_string(), "2dc27766-f623-4200-9d64-115e9bfd4a08");
        assert_eq!(Guid::parse("{2DC27766-F623-4200-9D64-115E9BFD4A08}"), Some(guid));
    }

    #[test]
    fn text_that_is_no_guid_is_none() {
        for text in ["", "{", "{}", "2dc27766", "{2dc27766-f623-4200-9d64-115e9bfd4a08", "zz"] {
            assert_eq!(Guid::parse(text), None, "{text}");
        }
    }
}
