//! What the demonstration claims, and for each claim a fault that makes it false on purpose.

use serde::Serialize;
use std::fmt;
use std::path::PathBuf;

macro_rules! claims {
    ($($claim:ident $word:literal $says:literal, broken by $fault:literal;)*) => {
        /// A claim; in the order in which they are checked.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, clap::ValueEnum)]
        #[serde(rename_all = "snake_case")]
        pub enum Claim {
            $(#[doc = $says] $claim,)*
        }

        impl Claim {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$claim,)*];

            /// Its name, as `--fault` takes it.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$claim => $word,)* }
            }

            /// What is claimed.
            pub const fn says(self) -> &'static str {
                match self { $(Self::$claim => $says,)* }
            }

            /// What `--fault` does to make it false.
            pub const fn fault(self) -> &'static str {
                match self { $(Self::$claim => $fault,)* }
            }
        }
    };
}

claims! {
    Vfs "vfs" "host 4 made five VFs of 4a:00.0, and each answers with its ids",
        broken by "one of them does not answer";
    Pool "pool" "host 8 lists the five, available",
        broken by "the cable is pulled";
    Borrow "borrow" "host 8 borrowed 44a01",
        broken by "the VF's reset at the start of the lease fails";
    Registers "registers" "the guest reached the VF's registers and memory on host 4",
        broken by "host 4's inbound window is closed";
    Dma "dma" "what DMA carried to the VF and back has the checksum of what was sent",
        broken by "the fabric loses one store of the VF";
    Interrupts "interrupts" "the guest took every interrupt that the VF raised",
        broken by "the VF's interrupt is masked on host 4";
    Order "order" "the data of every interrupt was there before it, over a fabric that holds DMA back",
        broken by "the fabric loses the data before an interrupt";
    Stray "stray" "DMA outside of the guest's memory was refused, and is on record",
        broken by "the VF may reach more than the guest's memory";
    Kill "kill" "the guest was killed amid its DMA, and host 8 undid its session",
        broken by "the guest leaves by itself";
    Reset "reset" "the VF is as after power-on: registers at reset values, memory cleared",
        broken by "its reset fails";
    Return "return" "44a01 is back in the pool",
        broken by "its reset at the end of the lease fails";
    Left "left" "nothing is left of it on either host: maps, window, triggers, fds, files",
        broken by "an fd stays open";
    Memory "memory" "all of it held less than 64 MiB of memory besides the guest's",
        broken by "80 MiB more are held";
}

impl fmt::Display for Claim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// What ends the demonstration before its end.
#[derive(Debug, thiserror::Error)]
pub enum DemoError {
    /// A claim that does not hold.
    #[error("claim `{claim}` does not hold ({}): {cause}", .claim.says())]
    Broken {
        /// Which.
        claim: Claim,
        /// What was seen instead.
        cause: String,
    },
    /// What it needs before it can claim anything.
    #[error("the demonstration cannot {act}: {cause}")]
    Setup {
        /// What was to be done.
        act: &'static str,
        /// Why not.
        cause: String,
    },
    /// A folder of its own.
    #[error(
        "cannot make a folder in {folder}: {cause}; set TMPDIR to one that this user may write to"
    )]
    Folder {
        /// Where.
        folder: PathBuf,
        /// Why not.
        cause: String,
    },
    /// By a signal.
    #[error("stopped by a signal; everything is taken down again")]
    Signal,
}

impl Claim {
    /// It does not hold.
    pub(super) fn broken(self, cause: impl Into<String>) -> DemoError {
        DemoError::Broken {
            claim: self,
            cause: cause.into(),
        }
    }

    /// Holds if it is so.
    pub(super) fn check(
        self,
        holds: bool,
        cause: impl FnOnce() -> String,
    ) -> Result<(), DemoError> {
        match holds {
            true => Ok(()),
            false => Err(self.broken(cause())),
        }
    }
}

/// For `map_err`: what is to be done, and why it cannot.
pub(super) fn setup<E: fmt::Display>(act: &'static str) -> impl Fn(E) -> DemoError {
    move |error| DemoError::Setup {
        act,
        cause: error.to_string(),
    }
}
