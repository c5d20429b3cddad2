//! What a lender tells of a function, judged before anything of this side is measured by it.

use crate::model::{BAR_COUNT, CONFIG_BYTES_MAX, IrqIndex, Span, WindowOffset};
use crate::path::message::{Refusal, RefusalCode, RemoteFunction};
use crate::path::plan::SlicePool;

const PAGE: u64 = 4096;

fn refuse(figure: u64, text: &str) -> Refusal {
    let mend = "both ends must run versions that belong together";
    let text = format!("the lender tells of {text}: {mend}");
    Refusal::new(RefusalCode::OutOfRange, figure, text)
}

/// Whether so many vectors can be.
pub(super) fn vectors(count: u32, most: u32) -> Result<(), Refusal> {
    if count <= most {
        return Ok(());
    }
    let text = format!("{count} interrupt vectors, and {most} are the most");
    Err(refuse(most.into(), &text))
}

/// Whether an opened function can be one: its vectors within its words, and each BAR in a slice of
/// its own, behind the mailbox and apart from the `others`. Returns the BARs' slices.
pub(super) fn function<'a>(
    function: &RemoteFunction,
    irq_count: u32,
    pool: &SlicePool,
    others: impl Iterator<Item = &'a Span>,
) -> Result<Vec<Span>, Refusal> {
    if usize::from(function.config_len) > CONFIG_BYTES_MAX {
        let bytes = function.config_len;
        return Err(refuse(
            CONFIG_BYTES_MAX as u64,
            &format!("{bytes} bytes of config space"),
        ));
    }
    for index in IrqIndex::ALL {
        let most = match index {
            IrqIndex::Msi | IrqIndex::Msix => irq_count,
            IrqIndex::Intx | IrqIndex::Err | IrqIndex::Req => 1,
        };
        vectors(function.irqs[index as usize].count, most)?;
    }
    let mut taken: Vec<Span> = others.copied().collect();
    let mut bars = Vec::new();
    for (bar, region) in function.regions.iter().enumerate().take(BAR_COUNT) {
        let Some(WindowOffset(offset)) = region.slice else {
            continue;
        };
        let size = region.info.size;
        pool.check_peer_range(WindowOffset(offset), size)?;
        let slice = Span::new(offset, size)
            .filter(|span| offset.is_multiple_of(PAGE) && !taken.iter().any(|t| t.overlaps(*span)));
        let Some(slice) = slice else {
            let text = format!("BAR {bar} at {offset:#x}+{size:#x}, which another BAR has");
            return Err(refuse(offset, &text));
        };
        taken.push(slice);
        bars.push(slice);
    }
    Ok(bars)
}
