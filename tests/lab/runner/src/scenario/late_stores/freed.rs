//! Memory of a guest that is no more: filled when its VMM's end has freed it, and looked at when the next tenant has worked.

use crate::agent::Agent;
use crate::scenario::client::Client;
use anyhow::{Context, Result, ensure};
use std::time::Duration;

const PAGE_MIB: u64 = 2;
const WAIT: Duration = Duration::from_secs(60);

/// Somebody's who has no function: DMA that comes there now is late. All of it is of huge pages, as
/// guests' memory is.
pub struct Freed {
    memory: Client,
    mib: u64,
}

impl Freed {
    /// Fills all huge pages but so many MiB that others keep. What the last guest had is among them
    /// when nothing of it is pinned any more, or held by a worker that had its descriptor.
    pub fn fill(agent: &Agent, last_mib: u64, kept_mib: u64) -> Result<Self> {
        let wanted = mib(agent, "Total")? - kept_mib;
        ensure!(wanted >= last_mib, "{kept_mib} MiB are kept, too many");
        let pages = wanted / PAGE_MIB;
        let freed = agent.wait_until(&format!("test $({}) -ge {pages}", count("Free")), WAIT);
        freed.with_context(|| format!("{wanted} MiB of huge pages are not free"))?;
        let mib = mib(agent, "Free")?;
        let memory = Client::huge_bystander(agent, "freed", mib)?;
        Ok(Freed { memory, mib })
    }

    /// The same of what this end of a VMM frees, and of nothing else: what is free before is kept
    /// until then, and is the next guest's.
    pub fn by(agent: &Agent, last_mib: u64, end: impl FnOnce() -> Result<()>) -> Result<Self> {
        let kept_mib = mib(agent, "Free")?;
        let kept = Client::huge_bystander(agent, "kept", kept_mib)?;
        end()?;
        let freed = Freed::fill(agent, last_mib, kept_mib)?;
        kept.end()?;
        Ok(freed)
    }

    /// Nobody has written there since; how many MiB that is.
    pub fn ensure_whole(self) -> Result<u64> {
        let looked = self.memory.look(1);
        looked.context("memory that an ended VMM has freed")?;
        self.memory.end()?;
        Ok(self.mib)
    }
}

fn mib(agent: &Agent, which: &str) -> Result<u64> {
    let pages: u64 = agent.sh(&count(which))?.trim().parse()?;
    Ok(pages * PAGE_MIB)
}

/// Shell words that tell how many huge pages there are.
fn count(which: &str) -> String {
    format!("sed -n 's/^HugePages_{which}: *//p' /proc/meminfo")
}
