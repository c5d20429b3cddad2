//! NVMe admin commands of virtualization management, by the kernel's passthrough ioctl.
// One ioctl without a safe wrapper.
#![allow(unsafe_code)]

use anyhow::{Context, Result, ensure};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl, opcode};
use std::ffi::c_void;
use std::fs::File;

/// NVMe Base Specification 2.0, 5.28: Virtualization Management.
const OPCODE_VIRT_MGMT: u8 = 0x1c;

/// linux/nvme_ioctl.h, struct nvme_passthru_cmd.
#[repr(C)]
#[derive(Default)]
struct PassthruCommand {
    opcode: u8,
    flags: u8,
    rsvd1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

const ADMIN_CMD: Opcode = opcode::read_write::<PassthruCommand>(b'N', 0x41);

/// The ioctl's own return value is the NVMe status, which rustix's ready-made kinds pass over.
struct AdminCommand<'a>(&'a mut PassthruCommand);

// SAFETY: the opcode is that of a nvme_passthru_cmd, which the pointer leads to for the whole call;
// the command holds no pointers itself.
unsafe impl Ioctl for AdminCommand<'_> {
    type Output = i32;

    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        ADMIN_CMD
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(status: IoctlOutput, _: *mut c_void) -> rustix::io::Result<i32> {
        Ok(status)
    }
}

/// Sends one command and gives its result dword back.
pub fn virt_mgmt(
    dev: &str,
    action: u32,
    resource: u32,
    controller: u32,
    count: u32,
) -> Result<u32> {
    let file = File::open(dev).with_context(|| format!("cannot open {dev}"))?;
    let mut command = PassthruCommand {
        opcode: OPCODE_VIRT_MGMT,
        cdw10: action | resource << 8 | controller << 16,
        cdw11: count,
        ..Default::default()
    };
    // SAFETY: see the implementation of `Ioctl` above.
    let status = unsafe { ioctl(&file, AdminCommand(&mut command)) }
        .with_context(|| format!("virtualization management {action:#x} on {dev}"))?;
    ensure!(
        status == 0,
        "virtualization management {action:#x} of controller {controller} on {dev}: NVMe status {status:#x}"
    );
    Ok(command.result)
}
