//! PCI addresses in lspci's shorthand: `4a:00.1`, `4a:` where only one function is there.

use crate::daemon::vocabulary::{ErrorCode, VerbError};
use std::{fs, path::Path, str::FromStr};
use vfio_shim::model::{Bdf, BdfError};

const DEVICES: &str = "/sys/bus/pci/devices";
/// Most functions that an ambiguous shorthand is told with.
const CANDIDATES_MAX: usize = 8;

/// What was typed: `[[[DOMAIN]:]BUS]:[DEV][.FN]`, each part hex or left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shorthand {
    text: String,
    domain: Option<u32>,
    bus: Option<u32>,
    device: Option<u32>,
    function: Option<u32>,
}

/// A part: left out, or hex up to `max`.
fn part(text: &str, max: u32) -> Option<Option<u32>> {
    if text.is_empty() || text == "*" {
        return Some(None);
    }
    if !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    let number = u32::from_str_radix(text, 16).ok()?;
    (number <= max).then_some(Some(number))
}

fn parse(text: &str) -> Option<Shorthand> {
    let (front, slot) = text.rsplit_once(':').unwrap_or(("", text));
    let (device, function) = slot.split_once('.').unwrap_or((slot, ""));
    // Without a domain it is domain 0; `*:4a:` asks for all of them.
    let (domain, bus) = front.rsplit_once(':').unwrap_or(("0", front));
    let shorthand = Shorthand {
        text: text.to_owned(),
        domain: part(domain, 0xffff)?,
        bus: part(bus, 0xff)?,
        device: part(device, 31)?,
        function: part(function, 7)?,
    };
    let named = [shorthand.bus, shorthand.device, shorthand.function];
    named.iter().any(Option::is_some).then_some(shorthand)
}

impl FromStr for Shorthand {
    type Err = BdfError;

    fn from_str(text: &str) -> Result<Self, BdfError> {
        parse(text).ok_or_else(|| BdfError::Bdf(text.to_owned()))
    }
}

impl Shorthand {
    /// The one function that is meant.
    pub fn resolve(&self) -> Result<Bdf, VerbError> {
        self.resolve_among(Path::new(DEVICES))
    }

    /// A whole address stands for itself, there or not; a part needs exactly one that matches.
    fn resolve_among(&self, devices: &Path) -> Result<Bdf, VerbError> {
        if let Ok(whole) = self.text.parse() {
            return Ok(whole);
        }
        let entries = fs::read_dir(devices).map_err(|e| {
            let text = format!(
                "cannot read {} to find `{}`: {e}; write the whole address",
                devices.display(),
                self.text
            );
            VerbError::new(ErrorCode::Kernel, text)
        })?;
        let mut found: Vec<Bdf> = entries
            .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
            .filter(|bdf| self.matches(*bdf))
            .collect();
        found.sort_unstable();
        match found.as_slice() {
            [one] => Ok(*one),
            [] => Err(VerbError::new(
                ErrorCode::UnknownFunction,
                format!(
                    "no function of this host matches `{}`; see `lspci -D`",
                    self.text
                ),
            )),
            several => Err(VerbError::new(
                ErrorCode::Ambiguous,
                self.ambiguous(several),
            )),
        }
    }

    fn ambiguous(&self, several: &[Bdf]) -> String {
        let shown: Vec<String> = (several.iter().take(CANDIDATES_MAX))
            .map(Bdf::to_string)
            .collect();
        let more = match several.len() - shown.len() {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!(
            "`{}` is {} functions: {}{more}; write one of them",
            self.text,
            several.len(),
            shown.join(", ")
        )
    }

    fn matches(&self, bdf: Bdf) -> bool {
        let same = |want: Option<u32>, is: u32| want.is_none_or(|want| want == is);
        same(self.domain, bdf.domain().into())
            && same(self.bus, bdf.bus().into())
            && same(self.device, bdf.device().into())
            && same(self.function, bdf.function().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str) -> Result<String, VerbError> {
        let devices = tempfile::tempdir().unwrap();
        for name in [
            "0000:00:1f.0",
            "0000:4a:00.0",
            "0000:4b:00.0",
            "0000:4b:00.1",
            "0001:4a:00.0",
        ] {
            fs::create_dir(devices.path().join(name)).unwrap();
        }
        let shorthand: Shorthand = text.parse().unwrap();
        shorthand
            .resolve_among(devices.path())
            .map(|bdf| bdf.to_string())
    }

    #[test]
    fn a_shorthand_that_is_unique_is_resolved() {
        assert_eq!(resolve("4a:").unwrap(), "0000:4a:00.0");
        assert_eq!(resolve("0001:4a:").unwrap(), "0001:4a:00.0");
        assert_eq!(resolve("4b:00.1").unwrap(), "0000:4b:00.1");
        assert_eq!(resolve(".1").unwrap(), "0000:4b:00.1");
        assert_eq!(resolve("1f.0").unwrap(), "0000:00:1f.0");
    }

    #[test]
    fn a_whole_address_stands_for_itself_whether_it_is_there_or_not() {
        assert_eq!(resolve("7f:00.0").unwrap(), "0000:7f:00.0");
    }

    #[test]
    fn a_shorthand_of_several_functions_is_refused_with_their_names() {
        let refusal = resolve("4b:").unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Ambiguous);
        assert_eq!(
            refusal.text,
            "`4b:` is 2 functions: 0000:4b:00.0, 0000:4b:00.1; write one of them"
        );
        assert_eq!(resolve("*:4a:").unwrap_err().code, ErrorCode::Ambiguous);
    }

    #[test]
    fn a_shorthand_of_nothing_is_refused() {
        assert_eq!(resolve("7f:").unwrap_err().code, ErrorCode::UnknownFunction);
    }

    #[test]
    fn what_is_no_shorthand_is_a_usage_error() {
        for bad in [
            "",
            ":",
            "x:",
            "100:",
            "4a:20",
            "4a:00.8",
            "1:2:3:4.5",
            "+4a:",
            "4a:00.1.2",
        ] {
            assert!(bad.parse::<Shorthand>().is_err(), "{bad}");
        }
    }
}
