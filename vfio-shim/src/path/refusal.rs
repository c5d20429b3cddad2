//! Why a request was refused: number, figure and words, fit for the wire and for people.

use super::wire::TEXT_BYTES_MAX;
use crate::model::{FunctionError, MapError};
use std::{error::Error, io};

/// Why a request was refused, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RefusalCode {
    /// The op is not known; figure = op.
    UnknownOp,
    /// No such function in the pool.
    UnknownFunction,
    /// Somebody has it.
    Taken,
    /// Policy says no.
    NotAllowed,
    /// Unknown, over, or wrong secret: told alike.
    NoLease,
    /// Not now.
    WrongState,
    /// The window has no room; figure = bytes that would do.
    WindowFull,
    /// Outside of what there is.
    OutOfRange,
    /// Over a limit; figure = the limit.
    Limit,
    /// The function cannot be reset.
    NoReset,
    /// In use by something else.
    Busy,
    /// The kernel refused; figure = errno.
    Kernel,
    /// The function is in quarantine.
    Quarantine,
    /// A number that this version does not know.
    Other(u16),
}

impl RefusalCode {
    const KNOWN: [Self; 13] = [
        Self::UnknownOp,
        Self::UnknownFunction,
        Self::Taken,
        Self::NotAllowed,
        Self::NoLease,
        Self::WrongState,
        Self::WindowFull,
        Self::OutOfRange,
        Self::Limit,
        Self::NoReset,
        Self::Busy,
        Self::Kernel,
        Self::Quarantine,
    ];

    /// The number on the wire.
    pub fn raw(self) -> u16 {
        match self {
            Self::Other(raw) => raw,
            known => Self::KNOWN
                .iter()
                .position(|code| *code == known)
                .map_or(0, |at| at as u16 + 1),
        }
    }

    /// From the number on the wire; 0 is no refusal.
    pub fn from_raw(raw: u16) -> Option<Self> {
        let at = usize::from(raw.checked_sub(1)?);
        Some(Self::KNOWN.get(at).copied().unwrap_or(Self::Other(raw)))
    }
}

/// A refused request: cause and mend, in words.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Refusal {
    /// The kind.
    pub code: RefusalCode,
    /// The figure that goes with it.
    pub figure: u64,
    /// For people.
    pub text: String,
}

impl Refusal {
    /// A refusal; the text is made fit for the wire.
    pub fn new(code: RefusalCode, figure: u64, text: impl AsRef<str>) -> Self {
        Self {
            code,
            figure,
            text: clean_text(text.as_ref()),
        }
    }

    /// This side is being stopped.
    pub fn stopped() -> Self {
        let text = "the port is being stopped; try again when it runs";
        Self::new(RefusalCode::WrongState, 0, text)
    }

    /// There is no open path to do it on.
    pub fn not_open() -> Self {
        let text = "the lease has no open path; open it first";
        Self::new(RefusalCode::WrongState, 0, text)
    }

    /// The kernel, or what stands for it, failed: the errno, if one is in the chain of causes.
    pub fn kernel(error: &(dyn Error + 'static)) -> Self {
        let mut cause = Some(error);
        let mut errno = None;
        while let (None, Some(error)) = (errno, cause) {
            errno = error.downcast_ref().and_then(io::Error::raw_os_error);
            cause = error.source();
        }
        let figure = errno.and_then(|errno| u64::try_from(errno).ok());
        let text = super::words(error);
        Self::new(RefusalCode::Kernel, figure.unwrap_or(0), text)
    }
}

impl From<FunctionError> for Refusal {
    fn from(error: FunctionError) -> Self {
        let code = match &error {
            FunctionError::OutOfRange { .. } => RefusalCode::OutOfRange,
            FunctionError::NoVector { .. } => RefusalCode::OutOfRange,
            FunctionError::NoReset => RefusalCode::NoReset,
            _ => return Self::kernel(&error),
        };
        Self::new(code, 0, super::words(&error))
    }
}

impl From<MapError> for Refusal {
    fn from(error: MapError) -> Self {
        let (code, figure) = match &error {
            MapError::WindowFull { enough, .. } => (RefusalCode::WindowFull, *enough),
            MapError::TooMany(limit) => (RefusalCode::Limit, u64::from(*limit)),
            MapError::Unusable { .. } => (RefusalCode::OutOfRange, 0),
            _ => return Self::kernel(&error),
        };
        Self::new(code, figure, super::words(&error))
    }
}

/// A text fit for the wire and for a terminal: at most `TEXT_BYTES_MAX` bytes, control
/// characters replaced.
pub fn clean_text(text: &str) -> String {
    let mut clean = String::new();
    for c in text.chars() {
        let c = if c.is_control() { '\u{fffd}' } else { c };
        if clean.len() + c.len_utf8() > TEXT_BYTES_MAX {
            break;
        }
        clean.push(c);
    }
    clean
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Span;

    #[test]
    fn texts_are_cut_at_a_character_and_hold_no_control_characters() {
        let long = "é".repeat(TEXT_BYTES_MAX);
        assert_eq!(clean_text(&long).len(), TEXT_BYTES_MAX);
        assert_eq!(
            clean_text(&format!("a{long}")).len(),
            TEXT_BYTES_MAX - 1,
            "no half character"
        );
        assert_eq!(clean_text("a\x1b[2J\nb"), "a\u{fffd}[2J\u{fffd}b");
    }

    #[test]
    fn refusal_codes_have_protocol_md_numbers() {
        for raw in 1..=20 {
            assert_eq!(RefusalCode::from_raw(raw).unwrap().raw(), raw);
        }
        assert_eq!(RefusalCode::from_raw(0), None);
        assert_eq!(RefusalCode::UnknownOp.raw(), 1);
        assert_eq!(RefusalCode::WindowFull.raw(), 7);
        assert_eq!(RefusalCode::Quarantine.raw(), 13);
        assert_eq!(RefusalCode::from_raw(14), Some(RefusalCode::Other(14)));
    }

    #[test]
    fn a_kernel_error_keeps_its_number_and_all_its_words() {
        let source = io::Error::from_raw_os_error(14);
        let span = Span::new(0x1000, 0x2000).unwrap();
        let act = "map";
        let refusal = Refusal::from(MapError::Kernel { act, span, source });
        assert_eq!((refusal.code, refusal.figure), (RefusalCode::Kernel, 14));
        let words = "the kernel refused to map 0x1000+0x2000: Bad address";
        assert!(refusal.text.starts_with(words), "{refusal}");
    }

    #[test]
    fn a_full_window_tells_the_figure_that_would_do() {
        let refusal = Refusal::from(MapError::WindowFull {
            wanted: 9,
            free: 1,
            enough: 1 << 33,
        });
        assert_eq!(refusal.code, RefusalCode::WindowFull);
        assert_eq!(refusal.figure, 1 << 33);
    }
}
