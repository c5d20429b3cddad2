//! PCI addresses as operators write them (`4a:00.1`) and fabric device ids (`44a01`).

use std::{fmt, str::FromStr};

/// A function's PCI address: domain, bus, device, function.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bdf {
    domain: u16,
    bus: u8,
    devfn: u8,
}

/// Why a text is no PCI address or fabric device id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BdfError {
    /// Not of the form of a PCI address.
    #[error(
        "`{0}` is no PCI address: write BUS:DEV.FN or DOMAIN:BUS:DEV.FN in hex, such as 4a:00.1"
    )]
    Bdf(String),
    /// Not of the form of a fabric device id.
    #[error(
        "`{0}` is no fabric device id: write NODE, bus and devfn as one hex word such as 44a01, or NODE:DOMAIN:BUS:DEV.FN"
    )]
    Fdid(String),
}

impl Bdf {
    /// `None` when `device` is over 31 or `function` over 7.
    pub const fn new(domain: u16, bus: u8, device: u8, function: u8) -> Option<Self> {
        if device > 31 || function > 7 {
            return None;
        }
        Some(Self {
            domain,
            bus,
            devfn: device << 3 | function,
        })
    }

    /// From the routing id (bus and devfn, PCIe 6.0 section 2.2.4.2).
    pub const fn from_routing_id(domain: u16, routing_id: u16) -> Self {
        Self {
            domain,
            bus: (routing_id >> 8) as u8,
            devfn: routing_id as u8,
        }
    }

    /// The PCI domain (Linux's segment group).
    pub const fn domain(self) -> u16 {
        self.domain
    }

    /// Bus and devfn as the 16-bit routing id.
    pub const fn routing_id(self) -> u16 {
        (self.bus as u16) << 8 | self.devfn as u16
    }

    /// The bus number.
    pub const fn bus(self) -> u8 {
        self.bus
    }

    /// The device number, 0..32.
    pub const fn device(self) -> u8 {
        self.devfn >> 3
    }

    /// The function number, 0..8.
    pub const fn function(self) -> u8 {
        self.devfn & 7
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { domain, bus, .. } = self;
        write!(
            f,
            "{domain:04x}:{bus:02x}:{:02x}.{:x}",
            self.device(),
            self.function()
        )
    }
}

fn hex(text: &str, digits_max: usize) -> Option<u32> {
    let fits = (1..=digits_max).contains(&text.len());
    if !fits || !text.bytes().all(|b| b.is_ascii_hexdigit()) {
        return None;
    }
    u32::from_str_radix(text, 16).ok()
}

fn parse_bdf(text: &str) -> Option<Bdf> {
    let (front, function) = text.rsplit_once('.')?;
    let mut fields = front.rsplit(':');
    let device = hex(fields.next()?, 2)?;
    let bus = hex(fields.next()?, 2)?;
    let domain = match fields.next() {
        Some(domain) => hex(domain, 4)?,
        None => 0,
    };
    if fields.next().is_some() {
        return None;
    }
    Bdf::new(
        domain as u16,
        bus as u8,
        u8::try_from(device).ok()?,
        hex(function, 1)? as u8,
    )
}

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        parse_bdf(text).ok_or_else(|| BdfError::Bdf(text.to_owned()))
    }
}

/// A function's name in the fabric: the lender's node id and the function's PCI address there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fdid {
    /// The lender's node id.
    pub node: u16,
    /// The function's address on the lender.
    pub bdf: Bdf,
}

impl fmt::Display for Fdid {
    /// One hex word (node, bus, devfn) where that is unambiguous, else the long form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.node <= 0xf && self.bdf.domain() == 0 {
            write!(f, "{:x}{:04x}", self.node, self.bdf.routing_id())
        } else {
            write!(f, "{:x}:{}", self.node, self.bdf)
        }
    }
}

fn parse_fdid(text: &str) -> Option<Fdid> {
    if let Some((node, bdf)) = text.split_once(':') {
        let node = hex(node, 4)? as u16;
        return Some(Fdid {
            node,
            bdf: parse_bdf(bdf)?,
        });
    }
    if text.len() != 5 {
        return None;
    }
    let word = hex(text, 5)?;
    Some(Fdid {
        node: (word >> 16) as u16,
        bdf: Bdf::from_routing_id(0, word as u16),
    })
}

impl FromStr for Fdid {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        parse_fdid(text).ok_or_else(|| BdfError::Fdid(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_documents_names_round_trip() {
        let fdid: Fdid = "44a01".parse().unwrap();
        assert_eq!(
            fdid,
            Fdid {
                node: 4,
                bdf: "4a:00.1".parse().unwrap()
            }
        );
        assert_eq!(fdid.to_string(), "44a01");
        let long: Fdid = "1f:0001:4a:00.1".parse().unwrap();
        assert_eq!(long.to_string(), "1f:0001:4a:00.1");
        assert_eq!(long.to_string().parse::<Fdid>().unwrap(), long);
    }

    #[test]
    fn malformed_names_are_errors_in_words() {
        for bad in [
            "", "4a", "4a:00", "4a:20.0", "4a:00.8", "4a:00.1x", "é:00.1", "+1:00.0",
        ] {
            assert!(bad.parse::<Bdf>().is_err(), "{bad}");
        }
        for bad in ["", "4401", "444a01", "g4a01", ":0000:4a:00.1", "4:4a:00"] {
            assert!(bad.parse::<Fdid>().is_err(), "{bad}");
        }
    }
}
