//! What a port and its daemon say to each other over their line, as bytes and as values; bounded.

use crate::daemon::vocabulary::BdfText;
use crate::pool::{Cause, End, Scrubbed};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use vfio_shim::path::clean_text;

/// The version of the line. Two that differ do not talk.
pub const VERSION: u32 = 1;
/// The most bytes of a message.
pub const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// The most leases in one message: each may bring a text.
pub const LEASES_PER_MESSAGE_MAX: usize = 32;

/// A lease that a port holds, or the last one of a function, which it holds no more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lease {
    /// Of which function.
    pub function: BdfText,
    /// Which lease.
    pub epoch: u64,
    /// Whether its path is open.
    pub path_open: bool,
    /// How it ended, if it has.
    pub end: Option<End>,
}

/// What a port says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromPort {
    /// Who it is: the first message.
    Hello {
        /// Of the line.
        version: u32,
        /// Of the program.
        build: String,
        /// The host's id.
        node: u16,
        /// The port's name.
        port: String,
    },
    /// Instead of all else: another daemon is connected.
    Taken {
        /// Its process.
        pid: Option<i32>,
    },
    /// Leases; as many messages as it takes.
    Holds(Vec<Lease>),
    /// There are no more of them.
    Ready,
    /// A borrower wants a function.
    Ask {
        /// Names the ask.
        ask: u64,
        /// Which function.
        function: BdfText,
        /// The node that asks.
        borrower: Option<u16>,
    },
    /// A path is open.
    Opened {
        /// Of which function.
        function: BdfText,
        /// Of which lease.
        epoch: u64,
    },
    /// A lease is over, and its path undone.
    Ended {
        /// Of which function.
        function: BdfText,
        /// Which lease.
        epoch: u64,
        /// How.
        end: End,
    },
    /// The port stops; its last word.
    Gone,
}

/// What the daemon says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum FromDaemon {
    /// The lease is written.
    Granted {
        /// Which ask is answered.
        ask: u64,
        /// The lease.
        epoch: u64,
    },
    /// It is not.
    Refused {
        /// Which ask is answered.
        ask: u64,
        /// The kind, as on the wire between ports.
        code: u16,
        /// The figure that goes with it.
        figure: u64,
        /// For people.
        text: String,
    },
    /// No path was opened in time.
    Expired {
        /// Which lease.
        epoch: u64,
    },
}

/// Why bytes are no message, or a message has no bytes.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// Over the bound.
    #[error("a message of {0} bytes: at most {MESSAGE_BYTES_MAX} are right")]
    TooLong(usize),
    /// More leases in a message than there may be.
    #[error("a message of {0} leases: at most {LEASES_PER_MESSAGE_MAX} are right")]
    TooMany(usize),
    /// Not what is said here.
    #[error("no message of this line")]
    Malformed(#[from] serde_json::Error),
}

fn encode(message: &impl Serialize) -> Result<Vec<u8>, MessageError> {
    let bytes = serde_json::to_vec(message)?;
    match bytes.len() {
        0..=MESSAGE_BYTES_MAX => Ok(bytes),
        len => Err(MessageError::TooLong(len)),
    }
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, MessageError> {
    match bytes.len() {
        0..=MESSAGE_BYTES_MAX => Ok(serde_json::from_slice(bytes)?),
        len => Err(MessageError::TooLong(len)),
    }
}

impl FromPort {
    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        self.check()?;
        encode(self)
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        let message: Self = decode(bytes)?;
        message.check()?;
        Ok(message)
    }

    fn check(&self) -> Result<(), MessageError> {
        match self {
            Self::Holds(leases) if leases.len() > LEASES_PER_MESSAGE_MAX => {
                Err(MessageError::TooMany(leases.len()))
            }
            _ => Ok(()),
        }
    }
}

impl FromDaemon {
    /// As bytes.
    pub fn encode(&self) -> Result<Vec<u8>, MessageError> {
        encode(self)
    }

    /// From bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
        decode(bytes)
    }
}

/// An end whose words fit in a message.
pub(crate) fn short(mut end: End) -> End {
    if let Cause::Revoked(why) = &mut end.cause {
        *why = clean_text(why);
    }
    if let Scrubbed::Failed(why) | Scrubbed::Cleared(why) = &mut end.scrubbed {
        *why = clean_text(why);
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use vfio_shim::model::Bdf;

    fn lease(function: u16) -> Lease {
        // Quotes take two bytes each in JSON: the longest that words can be.
        let words = "\"".repeat(4096);
        let bdf: Bdf = format!("{function:04x}:1f:1f.7").parse().unwrap();
        Lease {
            function: bdf.into(),
            epoch: u64::MAX,
            path_open: false,
            end: Some(short(End {
                cause: Cause::Revoked(words.clone()),
                scrubbed: Scrubbed::Failed(words),
            })),
        }
    }

    fn holds(count: usize) -> FromPort {
        FromPort::Holds((0..count as u16).map(lease).collect())
    }

    #[test]
    fn as_many_leases_as_may_be_fit_into_a_message_and_one_more_is_refused() {
        let most = holds(LEASES_PER_MESSAGE_MAX);
        assert_eq!(FromPort::decode(&most.encode().unwrap()).unwrap(), most);
        let more = holds(LEASES_PER_MESSAGE_MAX + 1);
        assert!(matches!(more.encode(), Err(MessageError::TooMany(_))));
        let bytes = serde_json::to_vec(&holds(LEASES_PER_MESSAGE_MAX + 1)).unwrap();
        assert!(FromPort::decode(&bytes).is_err());
    }

    #[test]
    fn message_of_the_largest_size_is_read_and_one_byte_more_is_refused() {
        let padded = |len: usize| {
            let mut bytes = FromPort::Gone.encode().unwrap();
            bytes.resize(len, b' ');
            bytes
        };
        assert!(FromPort::decode(&padded(MESSAGE_BYTES_MAX)).is_ok());
        let longer = FromPort::decode(&padded(MESSAGE_BYTES_MAX + 1));
        assert!(matches!(longer, Err(MessageError::TooLong(_))));
    }

    #[test]
    fn nonsense_is_no_message() {
        for bytes in [
            &b""[..],
            b"{}",
            b"\"ready\" \"ready\"",
            b"\"granted\"",
            b"{\"opened\":{\"function\":\"99:99.9\",\"epoch\":1}}",
            b"{\"opened\":{\"function\":\"0000:01:00.1\",\"epoch\":-1}}",
            b"{\"opened\":{\"function\":\"0000:01:00.1\",\"epoch\":1,\"secret\":2}}",
            b"\xff\xfe",
        ] {
            assert!(FromPort::decode(bytes).is_err());
            assert!(FromDaemon::decode(bytes).is_err());
        }
    }
}
