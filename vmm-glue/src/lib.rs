//! This host and a VM: the vfio-user server that hands a function to a VMM, and the glue for VMMs on kvm-ioctls.
//!
//! ```text
//! VMM (QEMU, cloud-hypervisor) --unix socket--> vfio_user::Endpoint --> dyn Function
//! VMM on kvm-ioctls, in this process --> kvm::Attachment --> dyn Function
//! dyn Function, in a VMM's process = vfio_user::Client --unix socket--> any vfio-user server
//! ```
//! It knows `vfio_shim::model` and nothing else of that crate: a function is whatever implements
//! [`Function`](vfio_shim::model::Function), on this host or on another. The server spawns no threads:
//! [`Endpoint::serve`](vfio_user::Endpoint::serve) runs in its caller's, until an fd becomes
//! readable, and [`SessionShared`](vfio_user::SessionShared) tells any other thread how it goes.
//!
//! - Addresses are guest-physical (what the function emits), sizes and offsets are in bytes.
//! - What a VMM sends is never believed: it ends its own guest session at worst, in words
//!   ([`SessionError`](vfio_user::SessionError)), and the next VMM is served.
//! - What the function or its address space refuse to undo ends the endpoint
//!   ([`EndpointError`](vfio_user::EndpointError)): the function must then serve nobody else.
#![deny(missing_docs)]

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
pub mod kvm;
pub mod vfio_user;
