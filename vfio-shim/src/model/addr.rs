//! Address newtypes that never meet unconverted, each in its own address space.

use std::fmt;

pub use vm_memory::GuestAddress;

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` past the end of the address space.
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// What a lent function emits: an address in the function's own container. It equals the
    /// guest-physical address of the borrower's guest.
    Iova
}
address! {
    /// What an NTB half emits into its own host: an address in the NTB's container.
    PortIova
}
address! {
    /// An offset into a memory window of a port, as seen from either side.
    WindowOffset
}
address! {
    /// An offset into a BAR of a function.
    BarOffset
}

impl From<GuestAddress> for Iova {
    /// The function's container holds guest RAM at its guest-physical address.
    fn from(gpa: GuestAddress) -> Self {
        Self(gpa.0)
    }
}
