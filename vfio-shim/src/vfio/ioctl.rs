//! VFIO's ioctls as functions that return every error; the layouts are vfio-bindings'.
#![allow(unsafe_code)] // ioctl(2) takes raw pointers; every one made here points into a live value.

use std::{
    ffi::{CStr, c_ulong},
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
};
use vfio_bindings::bindings::vfio::{
    VFIO_BASE, VFIO_TYPE, vfio_device_info, vfio_group_status, vfio_iommu_type1_dma_map,
    vfio_iommu_type1_dma_unmap, vfio_iommu_type1_info, vfio_irq_info, vfio_region_info,
};
use vmm_sys_util::ioctl::{
    ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_val,
};
use vmm_sys_util::ioctl_io_nr;

ioctl_io_nr!(VFIO_GET_API_VERSION, VFIO_TYPE.into(), VFIO_BASE);
ioctl_io_nr!(VFIO_CHECK_EXTENSION, VFIO_TYPE.into(), VFIO_BASE + 1);
ioctl_io_nr!(VFIO_SET_IOMMU, VFIO_TYPE.into(), VFIO_BASE + 2);
ioctl_io_nr!(VFIO_GROUP_GET_STATUS, VFIO_TYPE.into(), VFIO_BASE + 3);
ioctl_io_nr!(VFIO_GROUP_SET_CONTAINER, VFIO_TYPE.into(), VFIO_BASE + 4);
ioctl_io_nr!(VFIO_GROUP_GET_DEVICE_FD, VFIO_TYPE.into(), VFIO_BASE + 6);
ioctl_io_nr!(VFIO_DEVICE_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 7);
ioctl_io_nr!(VFIO_DEVICE_GET_REGION_INFO, VFIO_TYPE.into(), VFIO_BASE + 8);
ioctl_io_nr!(VFIO_DEVICE_GET_IRQ_INFO, VFIO_TYPE.into(), VFIO_BASE + 9);
ioctl_io_nr!(VFIO_DEVICE_SET_IRQS, VFIO_TYPE.into(), VFIO_BASE + 10);
ioctl_io_nr!(VFIO_DEVICE_RESET, VFIO_TYPE.into(), VFIO_BASE + 11);
ioctl_io_nr!(VFIO_IOMMU_GET_INFO, VFIO_TYPE.into(), VFIO_BASE + 12);
ioctl_io_nr!(VFIO_IOMMU_MAP_DMA, VFIO_TYPE.into(), VFIO_BASE + 13);
ioctl_io_nr!(VFIO_IOMMU_UNMAP_DMA, VFIO_TYPE.into(), VFIO_BASE + 14);

/// All that is asked of VFIO, by name: what a process may be held to.
pub fn requests() -> [(&'static str, u64); 14] {
    [
        ("VFIO_GET_API_VERSION", VFIO_GET_API_VERSION()),
        ("VFIO_CHECK_EXTENSION", VFIO_CHECK_EXTENSION()),
        ("VFIO_SET_IOMMU", VFIO_SET_IOMMU()),
        ("VFIO_GROUP_GET_STATUS", VFIO_GROUP_GET_STATUS()),
        ("VFIO_GROUP_SET_CONTAINER", VFIO_GROUP_SET_CONTAINER()),
        ("VFIO_GROUP_GET_DEVICE_FD", VFIO_GROUP_GET_DEVICE_FD()),
        ("VFIO_DEVICE_GET_INFO", VFIO_DEVICE_GET_INFO()),
        ("VFIO_DEVICE_GET_REGION_INFO", VFIO_DEVICE_GET_REGION_INFO()),
        ("VFIO_DEVICE_GET_IRQ_INFO", VFIO_DEVICE_GET_IRQ_INFO()),
        ("VFIO_DEVICE_SET_IRQS", VFIO_DEVICE_SET_IRQS()),
        ("VFIO_DEVICE_RESET", VFIO_DEVICE_RESET()),
        ("VFIO_IOMMU_GET_INFO", VFIO_IOMMU_GET_INFO()),
        ("VFIO_IOMMU_MAP_DMA", VFIO_IOMMU_MAP_DMA()),
        ("VFIO_IOMMU_UNMAP_DMA", VFIO_IOMMU_UNMAP_DMA()),
    ]
}

/// The longest info structure with capabilities that is accepted; the kernel's are under 1 KiB.
pub(super) const INFO_BYTES_MAX: usize = 64 << 10;

fn check(result: i32) -> io::Result<i32> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Of SET_IRQS. More than 0 is no success: so many vectors could be had, and none is enabled.
fn check_vectors(result: i32) -> io::Result<()> {
    match check(result)? {
        0 => Ok(()),
        most => Err(io::Error::other(format!(
            "the kernel can give it {most} vectors at most, and has enabled none: several of MSI \
             need interrupt remapping, and else let devices of this host go that take many"
        ))),
    }
}

fn size_of_u32<T>() -> u32 {
    size_of::<T>() as u32
}

pub(super) fn api_version(container: BorrowedFd<'_>) -> io::Result<i32> {
    // SAFETY: the request takes no pointer.
    check(unsafe { ioctl(&container, VFIO_GET_API_VERSION()) })
}

pub(super) fn has_extension(container: BorrowedFd<'_>, extension: u32) -> io::Result<bool> {
    // SAFETY: the request takes a number.
    let result =
        unsafe { ioctl_with_val(&container, VFIO_CHECK_EXTENSION(), c_ulong::from(extension)) };
    Ok(check(result)? > 0)
}

pub(super) fn set_iommu(container: BorrowedFd<'_>, kind: u32) -> io::Result<()> {
    // SAFETY: the request takes a number.
    check(unsafe { ioctl_with_val(&container, VFIO_SET_IOMMU(), c_ulong::from(kind)) }).map(drop)
}

pub(super) fn group_status(group: BorrowedFd<'_>) -> io::Result<vfio_group_status> {
    let mut status = vfio_group_status {
        argsz: size_of_u32::<vfio_group_status>(),
        flags: 0,
    };
    // SAFETY: `status` is a live vfio_group_status with its argsz set.
    check(unsafe { ioctl_with_mut_ref(&group, VFIO_GROUP_GET_STATUS(), &mut status) })?;
    Ok(status)
}

pub(super) fn group_set_container(
    group: BorrowedFd<'_>,
    container: BorrowedFd<'_>,
) -> io::Result<()> {
    let fd = container.as_raw_fd();
    // SAFETY: the request reads one int.
    check(unsafe { ioctl_with_ptr(&group, VFIO_GROUP_SET_CONTAINER(), &raw const fd) }).map(drop)
}

pub(super) fn group_device_fd(group: BorrowedFd<'_>, name: &CStr) -> io::Result<OwnedFd> {
    // SAFETY: `name` is a NUL-terminated string that outlives the call.
    let fd = check(unsafe { ioctl_with_ptr(&group, VFIO_GROUP_GET_DEVICE_FD(), name.as_ptr()) })?;
    // SAFETY: the kernel has just given this fd to us; nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn device_info(device: BorrowedFd<'_>) -> io::Result<vfio_device_info> {
    let mut info = vfio_device_info {
        argsz: size_of_u32::<vfio_device_info>(),
        ..Default::default()
    };
    // SAFETY: `info` is a live vfio_device_info with its argsz set.
    check(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_GET_INFO(), &mut info) })?;
    Ok(info)
}

pub(super) fn irq_info(device: BorrowedFd<'_>, index: u32) -> io::Result<vfio_irq_info> {
    let mut info = vfio_irq_info {
        argsz: size_of_u32::<vfio_irq_info>(),
        index,
        ..Default::default()
    };
    // SAFETY: `info` is a live vfio_irq_info with its argsz set.
    check(unsafe { ioctl_with_mut_ref(&device, VFIO_DEVICE_GET_IRQ_INFO(), &mut info) })?;
    Ok(info)
}

/// Asks for an info structure that may be followed by capabilities: `header` goes in, `argsz`
/// (its first word) is set here, and all that the kernel wrote comes out.
fn info_with_caps(fd: BorrowedFd<'_>, request: c_ulong, header: &[u32]) -> io::Result<Vec<u8>> {
    let mut bytes = size_of_val(header);
    // The first round tells the length, the second gets it all; a third only if it grew.
    for _ in 0..3 {
        let mut words = vec![0u64; bytes.div_ceil(8)];
        {
            let (head, _) = as_u32_mut(&mut words).split_at_mut(header.len());
            head.copy_from_slice(header);
            head[0] = bytes as u32;
        }
        // SAFETY: the kernel writes at most argsz bytes, and `words` has that many.
        check(unsafe { ioctl_with_mut_ptr(&fd, request, words.as_mut_ptr()) })?;
        let wanted = as_u32_mut(&mut words)[0] as usize;
        if wanted <= bytes {
            let mut out: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
            out.truncate(bytes);
            return Ok(out);
        }
        if wanted > INFO_BYTES_MAX {
            break;
        }
        bytes = wanted;
    }
    Err(io::Error::other("the kernel's answer has no bound"))
}

fn as_u32_mut(words: &mut [u64]) -> &mut [u32] {
    let len = words.len() * 2;
    // SAFETY: a u64 is two u32, of weaker alignment, and every bit pattern is a u32.
    unsafe { std::slice::from_raw_parts_mut(words.as_mut_ptr().cast(), len) }
}

/// A `vfio_region_info` and its capabilities.
pub(super) fn region_info(device: BorrowedFd<'_>, index: u32) -> io::Result<Vec<u8>> {
    let mut header = [0u32; size_of::<vfio_region_info>() / 4];
    header[2] = index;
    info_with_caps(device, VFIO_DEVICE_GET_REGION_INFO(), &header)
}

/// A `vfio_iommu_type1_info` and its capabilities.
pub(super) fn iommu_info(container: BorrowedFd<'_>) -> io::Result<Vec<u8>> {
    let header = [0u32; size_of::<vfio_iommu_type1_info>() / 4];
    info_with_caps(container, VFIO_IOMMU_GET_INFO(), &header)
}

/// Sets irqs: `words` are flags, index, start, count and the data, argsz not included.
pub(super) fn set_irqs(device: BorrowedFd<'_>, words: &[u32]) -> io::Result<()> {
    let mut set = Vec::with_capacity(words.len() + 1);
    set.push((words.len() as u32 + 1) * 4);
    set.extend_from_slice(words);
    // SAFETY: `set` is a vfio_irq_set (five words, then the data) of argsz bytes.
    check_vectors(unsafe { ioctl_with_ptr(&device, VFIO_DEVICE_SET_IRQS(), set.as_ptr()) })
}

pub(super) fn device_reset(device: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: the request takes no pointer.
    check(unsafe { ioctl(&device, VFIO_DEVICE_RESET()) }).map(drop)
}

/// Lets the device reach `size` bytes at `vaddr` of this process.
///
/// # Safety
/// `size` bytes at `vaddr` must be mapped during the call, and must not be memory whose content
/// Rust relies on: the device may write it from now on.
pub(super) unsafe fn map_dma(
    container: BorrowedFd<'_>,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
) -> io::Result<()> {
    let map = vfio_iommu_type1_dma_map {
        argsz: size_of_u32::<vfio_iommu_type1_dma_map>(),
        flags,
        vaddr,
        iova,
        size,
    };
    // SAFETY: `map` is a live vfio_iommu_type1_dma_map; of the vaddr the caller promises.
    check(unsafe { ioctl_with_ptr(&container, VFIO_IOMMU_MAP_DMA(), &raw const map) }).map(drop)
}

/// Takes DMA mappings away; returns how many bytes of them there were.
pub(super) fn unmap_dma(container: BorrowedFd<'_>, iova: u64, size: u64) -> io::Result<u64> {
    let mut unmap = vfio_iommu_type1_dma_unmap {
        argsz: size_of_u32::<vfio_iommu_type1_dma_unmap>(),
        flags: 0,
        iova,
        size,
        ..Default::default()
    };
    // SAFETY: `unmap` is a live vfio_iommu_type1_dma_unmap without data.
    check(unsafe { ioctl_with_mut_ref(&container, VFIO_IOMMU_UNMAP_DMA(), &mut unmap) })?;
    Ok(unmap.size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fewer_vectors_than_asked_for_are_an_error_that_says_how_many_there_are() {
        assert!(check_vectors(0).is_ok());
        assert!(check_vectors(-1).is_err());
        let fewer = check_vectors(3).unwrap_err().to_string();
        assert!(fewer.contains("3 vectors at most"), "{fewer}");
    }
}
