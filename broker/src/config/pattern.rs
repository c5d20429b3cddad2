//! Patterns of PCI addresses for the allow list: `01:00.1`, `01:00.*`, `0000:02:*`, `*`.

use std::{fmt, str::FromStr};
use vfio_shim::model::Bdf;

/// Which functions an entry of the allow list names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BdfPattern {
    /// Every function.
    Any,
    /// All of one bus.
    Bus {
        /// Domain.
        domain: u16,
        /// Bus.
        bus: u8,
    },
    /// All functions of one device.
    Device {
        /// The device, by its function 0.
        function_0: Bdf,
    },
    /// One function.
    One(Bdf),
}

/// Why a text is no pattern.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` names no PCI functions: write 01:00.1, 01:00.*, 0000:02:* or *")]
pub struct PatternError(String);

impl BdfPattern {
    /// Whether the function is one of those named.
    pub fn matches(self, bdf: Bdf) -> bool {
        match self {
            Self::Any => true,
            Self::Bus { domain, bus } => (bdf.domain(), bdf.bus()) == (domain, bus),
            Self::Device { function_0: d } => {
                (bdf.domain(), bdf.bus(), bdf.device()) == (d.domain(), d.bus(), d.device())
            }
            Self::One(one) => bdf == one,
        }
    }
}

fn parse(text: &str) -> Option<BdfPattern> {
    if text == "*" {
        return Some(BdfPattern::Any);
    }
    if let Some(device) = text.strip_suffix(".*") {
        let function_0 = format!("{device}.0").parse().ok()?;
        return Some(BdfPattern::Device { function_0 });
    }
    if let Some(bus) = text.strip_suffix(":*") {
        let any: Bdf = format!("{bus}:00.0").parse().ok()?;
        return Some(BdfPattern::Bus {
            domain: any.domain(),
            bus: any.bus(),
        });
    }
    text.parse().ok().map(BdfPattern::One)
}

impl FromStr for BdfPattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        parse(text).ok_or_else(|| PatternError(text.to_owned()))
    }
}

impl fmt::Display for BdfPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Bus { domain, bus } => write!(f, "{domain:04x}:{bus:02x}:*"),
            Self::Device { function_0: d } => {
                write!(f, "{:04x}:{:02x}:{:02x}.*", d.domain(), d.bus(), d.device())
            }
            Self::One(bdf) => bdf.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, bdf: &str) -> bool {
        pattern
            .parse::<BdfPattern>()
            .unwrap()
            .matches(bdf.parse().unwrap())
    }

    #[test]
    fn a_pattern_matches_what_it_names_and_nothing_beside_it() {
        assert!(matches("01:00.1", "0000:01:00.1"));
        assert!(!matches("01:00.1", "0001:01:00.1"));
        assert!(matches("01:00.*", "01:00.7"));
        assert!(!matches("01:00.*", "01:01.0"));
        assert!(matches("0000:02:*", "02:1f.7"));
        assert!(!matches("0000:02:*", "03:00.0"));
        assert!(!matches("0001:02:*", "02:00.0"));
        assert!(matches("*", "0001:02:00.0"));
    }

    #[test]
    fn what_names_no_functions_is_refused() {
        for bad in [
            "",
            "01",
            "01:*.1",
            "*:00.1",
            "01:20.*",
            "1:2:3:*",
            "01:00.*.*",
        ] {
            assert!(bad.parse::<BdfPattern>().is_err(), "{bad}");
        }
    }
}
