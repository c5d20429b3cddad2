//! A function's interrupts as VFIO numbers them.

/// An irq index of vfio-pci (`VFIO_PCI_*_IRQ_INDEX`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum IrqIndex {
    /// Legacy INTx. Never offered: a VF has none, and it cannot cross the NTB.
    Intx = 0,
    /// MSI.
    Msi = 1,
    /// MSI-X.
    Msix = 2,
    /// An uncorrected error of the device.
    Err = 3,
    /// The host wants the device back.
    Req = 4,
}

impl IrqIndex {
    /// How many indices vfio-pci has.
    pub const COUNT: usize = 5;
    /// All of them, in order.
    pub const ALL: [Self; Self::COUNT] = [Self::Intx, Self::Msi, Self::Msix, Self::Err, Self::Req];

    /// Whether its vectors are messages of the device: what a guest has of a function.
    pub const fn is_message(self) -> bool {
        matches!(self, Self::Msi | Self::Msix)
    }

    /// From VFIO's number.
    pub fn from_raw(raw: u32) -> Option<Self> {
        Self::ALL.get(raw as usize).copied()
    }
}

/// What an irq index has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct IrqInfo {
    /// How many vectors; 0 = none.
    pub count: u32,
}
