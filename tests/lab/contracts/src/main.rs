//! Runs one check of a contract on real VFIO: on both halves of an NTB, or on a function's container.

use anyhow::{Context, Result, bail};
use std::process::ExitCode;
use vfio_shim::model::{AddressSpace, Bdf, Function, space_contract};
use vfio_shim::ntb::contract;
use vfio_shim::ntb::hw::IntelPort;
use vfio_shim::sysfs::Sysfs;
use vfio_shim::vfio::VfioFunction;

const USAGE: &str = "usage: lab-contracts COMMAND
  list port|space            the checks' names
  port CHECK BDF BDF         on two joined NTB halves, both bound to vfio-pci
  space CHECK BDF            on the container of a function bound to vfio-pci";

type PortCheck = fn((&IntelPort, &IntelPort));
type SpaceCheck = fn(&dyn AddressSpace);

macro_rules! port_checks {
    ($($name:ident)*) => {
        const PORT: &[(&str, PortCheck)] = &[$((stringify!($name), contract::$name)),*];
    };
}
vfio_shim::port_contract!(port_checks);

macro_rules! space_checks {
    ($($name:ident)*) => {
        const SPACE: &[(&str, SpaceCheck)] = &[$((stringify!($name), space_contract::$name)),*];
    };
}
vfio_shim::space_contract!(space_checks);

fn named<T: Copy>(checks: &[(&str, T)], name: &str) -> Result<T> {
    let found = checks.iter().find(|(known, _)| *known == name);
    let (_, check) = found.with_context(|| format!("no check is named `{name}`"))?;
    Ok(*check)
}

fn bdf(text: &str) -> Result<Bdf> {
    text.parse().with_context(|| text.to_owned())
}

fn run(words: &[&str]) -> Result<()> {
    let sysfs = Sysfs::new("/sys");
    match words {
        ["list", "port"] => PORT.iter().for_each(|(name, _)| println!("{name}")),
        ["list", "space"] => SPACE.iter().for_each(|(name, _)| println!("{name}")),
        ["port", name, one, two] => {
            let check = named(PORT, name)?;
            let open = |text: &str| anyhow::Ok(IntelPort::open(bdf(text)?, &sysfs)?);
            check((&open(one)?, &open(two)?));
        }
        ["space", name, function] => {
            let check = named(SPACE, name)?;
            let function = VfioFunction::open(bdf(function)?, &sysfs)?;
            check(function.address_space());
        }
        _ => bail!("{USAGE}"),
    }
    Ok(())
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    // A check that is not kept panics, and says where.
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-contracts: {error:#}");
            ExitCode::FAILURE
        }
    }
}
