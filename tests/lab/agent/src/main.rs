//! The program inside the lab's hosts and guests: serves the runner, and is a few small tools.

mod canary;
mod devmem;
mod dio;
mod fuse;
mod hostile;
mod interrupts;
mod nvme;
mod nvme_remote;
mod nvme_user;
mod process;
mod relay;
mod serve;
mod snapshot;
mod user;
mod vfio_user;
mod vmm;
mod witness;

use anyhow::{Context, Result, bail};
use nvme_user::Direction;
use std::process::ExitCode;

const USAGE: &str = "usage: lab-agent COMMAND
  serve PORT                        answer the runner on this character device
  nvme-virt-mgmt DEV ACTION RESOURCE CONTROLLER COUNT
  nvme-user BDF registers           of a function without a driver, as JSON
  nvme-user BDF leave PATTERN       leave it enabled, with this in its interrupt mask
  nvme-user BDF write|read [ADDR]   the controller's DMA at an address, or in its own page
  devmem read PHYS BYTES            32-bit reads, as hex words
  devmem write PHYS VALUE           one 32-bit write
  dio write DEV OFFSET BYTES SEED   O_DIRECT, prints the SHA-256
  dio read DEV OFFSET BYTES
  interrupts BDF                    /proc/interrupts of one device, as JSON
  vfio-user SOCKET CASE             a client without a VMM; cases: good, version, early, oversized,
                                    private, became-private, file, short, read-only, reserved, window
  vfio-user SOCKET vmm FIFO LBA [MIB]
                                    drives the function as the FIFO says: open, map, work, more, leave,
                                    look, go, end; its canary is so many MiB of huge pages, else one of
                                    ordinary ones
  witness SOCKET STOP LOG           a tenant at work until the file STOP is there; a line for each piece
  hostile SOCKET CASE LOG           a VMM that means harm, and what it costs the witness of this log;
                                    cases: flood, far, unread, storm, maps, fuse, truncated, punched
  storm SOCKET STOP                 interrupts as fast as they come until the file STOP is there
  as UID PROGRAM ARG...             run it as this user, who may lock any amount of memory
  snapshot                          what a scenario may not leave behind, as JSON";

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    match run(&words) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("lab-agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(words: &[&str]) -> Result<()> {
    match words {
        ["serve", port] => serve::serve(port),
        ["as", uid, program, args @ ..] => user::run_as(number(uid)? as u32, program, args),
        ["nvme-virt-mgmt", dev, action, resource, controller, count] => {
            let result = nvme::virt_mgmt(
                dev,
                number(action)? as u32,
                number(resource)? as u32,
                number(controller)? as u32,
                number(count)? as u32,
            )?;
            println!("{result}");
            Ok(())
        }
        ["nvme-user", bdf, "registers"] => nvme_user::print_registers(bdf),
        ["nvme-user", bdf, "leave", pattern] => {
            nvme_user::leave_running(bdf, number(pattern)? as u32)
        }
        ["nvme-user", bdf, direction, address @ ..] => {
            let direction = match *direction {
                "write" => Direction::Write,
                "read" => Direction::Read,
                _ => bail!("{USAGE}"),
            };
            let address = address.first().map(|text| number(text)).transpose()?;
            nvme_user::dma(bdf, direction, address)
        }
        ["devmem", "read", phys, bytes] => devmem::read(number(phys)?, number(bytes)? as usize),
        ["devmem", "write", phys, value] => devmem::write(number(phys)?, number(value)? as u32),
        ["dio", "write", dev, offset, bytes, seed] => {
            dio::write(dev, number(offset)?, number(bytes)?, number(seed)?)
        }
        ["dio", "read", dev, offset, bytes] => dio::read(dev, number(offset)?, number(bytes)?),
        ["interrupts", bdf] => interrupts::print(bdf),
        ["vfio-user", socket, "vmm", orders, lba, mib @ ..] => {
            let mib = mib.first().map(|text| number(text)).transpose()?;
            vmm::run(socket, orders, number(lba)?, mib)
        }
        ["vfio-user", socket, case] => vfio_user::run(socket, case),
        ["witness", socket, stop, log] => witness::run(socket, stop, log),
        ["storm", socket, stop] => hostile::storm_until(socket, stop),
        ["hostile", socket, case, log] => hostile::run(socket, case, log),
        ["snapshot"] => snapshot::print(),
        _ => bail!("{USAGE}"),
    }
}

/// A decimal number, or a hexadecimal one after `0x`.
fn number(text: &str) -> Result<u64> {
    let parsed = match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16),
        None => text.parse(),
    };
    parsed.with_context(|| format!("not a number: {text}"))
}
