//! Vectors against the guest's local APIC: any order of trigger, message and mask loses and invents nothing.

use kvm_bindings::{KVM_IRQCHIP_IOAPIC, kvm_ioapic_state, kvm_irqchip, kvm_lapic_state};
use kvm_ioctls::VcpuFd;
use kvm_tests::{until, vm};
use rustix::event::{EventfdFlags, eventfd};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use vmm_glue::kvm::{Gsi, IrqError, ROUTES_MAX, Vectors, Vm, tiny};

/// Registers of the local APIC as KVM lays them out (Intel SDM 3A, table 12-1).
const SVR: usize = 0xf0;
const IRR: usize = 0x200;
const FIRST: u8 = 0x40;

/// A vCPU that never runs: what is raised stays in its APIC's request register.
struct Requests {
    vcpu: VcpuFd,
    vm: Vm,
}

impl Requests {
    fn new(vm: Vm) -> Self {
        let vcpu = vm.vcpu(0).unwrap();
        let mut apic = vcpu.get_lapic().unwrap();
        apic.regs[SVR..SVR + 2].copy_from_slice(&[0xff_u8 as _, 1]);
        vcpu.set_lapic(&apic).unwrap();
        Self { vcpu, vm }
    }

    fn byte(apic: &mut kvm_lapic_state, vector: u8) -> &mut std::ffi::c_char {
        let word = IRR + usize::from(vector / 32) * 16;
        &mut apic.regs[word + usize::from(vector % 32 / 8)]
    }

    fn has(&self, vector: u8) -> bool {
        let mut apic = self.vcpu.get_lapic().unwrap();
        *Self::byte(&mut apic, vector) as u8 >> (vector % 8) & 1 != 0
    }

    /// Takes one that is there or will be at once.
    fn take(&self, vector: u8) {
        until(&format!("vector {vector:#x} is raised"), || {
            self.has(vector)
        });
        let mut apic = self.vcpu.get_lapic().unwrap();
        let byte = Self::byte(&mut apic, vector);
        *byte &= !(1u8 << (vector % 8)) as std::ffi::c_char;
        self.vcpu.set_lapic(&apic).unwrap();
    }
}

fn trigger() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn signal(fd: &OwnedFd) {
    rustix::io::write(fd, &1u64.to_ne_bytes()).unwrap();
}

#[test]
fn same_trigger_set_twice_raises_once_for_each_signal() {
    let Some(vm) = vm() else { return };
    let requests = Requests::new(vm);
    let mut vectors = Vectors::new(Arc::clone(requests.vm.routes()), 2);
    let fd = trigger();
    for _ in 0..3 {
        vectors
            .set_trigger(1, Some(fd.try_clone().unwrap()))
            .unwrap();
        vectors.set_message(1, Some(tiny::message(FIRST))).unwrap();
        signal(&fd);
        requests.take(FIRST);
    }
    assert_eq!(vectors.wired(), 1);
    vectors.clear().unwrap();
    vectors.clear().unwrap();
    assert!(!requests.has(FIRST), "no more than was signalled");
    assert_eq!(requests.vm.routes().allocated(), 0);
}

#[test]
fn one_trigger_for_two_vectors_is_refused_and_both_stay_as_they_were() {
    let Some(vm) = vm() else { return };
    let requests = Requests::new(vm);
    let mut vectors = Vectors::new(Arc::clone(requests.vm.routes()), 2);
    let fds = [trigger(), trigger()];
    for (at, fd) in (0..).zip(&fds) {
        vectors
            .set_trigger(at, Some(fd.try_clone().unwrap()))
            .unwrap();
        vectors
            .set_message(at, Some(tiny::message(FIRST + at as u8)))
            .unwrap();
    }
    let refused = vectors.set_trigger(1, Some(fds[0].try_clone().unwrap()));
    assert!(matches!(refused, Err(IrqError::Kernel { number: 1, .. })));
    for (at, fd) in (0..).zip(&fds) {
        signal(fd);
        requests.take(FIRST + at);
    }
}

#[test]
fn vector_past_the_last_is_refused() {
    let Some(vm) = vm() else { return };
    let mut vectors = Vectors::new(Arc::clone(vm.routes()), 2);
    let refused = [
        vectors.set_trigger(2, None),
        vectors.set_message(2, None),
        vectors.set_masked(2, true),
        vectors.set_masked(u32::MAX, true),
    ];
    for refused in refused {
        assert!(matches!(refused, Err(IrqError::NoVector { count: 2, .. })));
    }
}

#[test]
fn routes_are_bounded_and_given_again() {
    let Some(vm) = vm() else { return };
    let routes = vm.routes();
    let mut all: Vec<Gsi> = (0..ROUTES_MAX)
        .map(|_| routes.allocate().unwrap())
        .collect();
    assert!(matches!(
        routes.allocate(),
        Err(IrqError::RoutesFull(ROUTES_MAX))
    ));
    all.last().unwrap().route(tiny::message(FIRST)).unwrap();
    let number = all.swap_remove(7).number();
    assert_eq!(routes.allocate().unwrap().number(), number);
    drop(all);
    assert_eq!((routes.allocated(), routes.routed().len()), (0, 0));
}

#[test]
fn legacy_pins_stay_routed_beside_msis() {
    let Some(vm) = vm() else { return };
    let requests = Requests::new(vm);
    let gsi = requests.vm.routes().allocate().unwrap();
    gsi.route(tiny::message(FIRST)).unwrap();
    // Pin 4 of the I/O APIC raises the next vector: edge, unmasked, to APIC 0.
    let pin = 4;
    let mut ioapic = kvm_ioapic_state::default();
    ioapic.redirtbl[pin].bits = u64::from(FIRST) + 1;
    let mut chip = kvm_irqchip {
        chip_id: KVM_IRQCHIP_IOAPIC,
        ..Default::default()
    };
    chip.chip.ioapic = ioapic;
    requests.vm.fd().unwrap().set_irqchip(&chip).unwrap();
    requests
        .vm
        .fd()
        .unwrap()
        .set_irq_line(pin as u32, true)
        .unwrap();
    requests.take(FIRST + 1);
}

/// A small generator with a printed seed (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

#[derive(Default)]
struct Model {
    trigger: Option<OwnedFd>,
    masked: bool,
    message: bool,
    /// Signalled while it could not be raised.
    held: bool,
}

/// Raise, mask, unmask, swap, take away and give again, 5,000 times: after each the APIC has been
/// asked for exactly what the model says.
#[test]
fn random_raise_mask_unmask_and_swap_lose_and_invent_nothing() {
    let Some(vm) = vm() else { return };
    let requests = Requests::new(vm);
    let seed = 0x5b1e_0003;
    eprintln!("seed {seed:#x}");
    let mut random = Random(seed);
    let count = 4;
    let mut vectors = Vectors::new(Arc::clone(requests.vm.routes()), count);
    let mut models: Vec<Model> = (0..count).map(|_| Model::default()).collect();
    for step in 0..5_000 {
        let at = random.below(count.into()) as u32;
        let model = &mut models[at as usize];
        match random.below(8) {
            0 => {
                let fd = trigger();
                vectors
                    .set_trigger(at, Some(fd.try_clone().unwrap()))
                    .unwrap();
                model.held &= model.trigger.is_some();
                model.trigger = Some(fd);
            }
            1 => {
                vectors.set_trigger(at, None).unwrap();
                model.trigger = None;
                model.held = false;
            }
            2 | 3 => {
                model.masked = !model.masked;
                vectors.set_masked(at, model.masked).unwrap();
            }
            4 => {
                model.message = random.below(4) != 0;
                let message = tiny::message(FIRST + at as u8);
                vectors
                    .set_message(at, model.message.then_some(message))
                    .unwrap();
            }
            _ => {
                if let Some(fd) = &model.trigger {
                    signal(fd);
                    model.held = true;
                }
            }
        }
        let open = model.trigger.is_some() && !model.masked && model.message;
        if open && std::mem::take(&mut model.held) {
            requests.take(FIRST + at as u8);
        }
        assert_eq!(vectors.is_pending(at), model.held, "step {step}");
        let invented = (0..count as u8).find(|at| requests.has(FIRST + at));
        assert_eq!(invented, None, "step {step}");
    }
    vectors.clear().unwrap();
    assert_eq!(requests.vm.routes().allocated(), 0);
}
