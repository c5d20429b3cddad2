//! System calls that a role may make: a named list, and the seccomp filter that holds a process to it.

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};
use std::collections::BTreeMap;

type Boxed = Box<dyn std::error::Error + Send + Sync>;

/// Which calls of a number are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// All.
    Any,
    /// Those whose argument of this index (from 0) has this value.
    Is(u8, u64),
    /// Those whose argument of this index has none of these bits.
    Without(u8, u64),
}

/// One entry of a role's list.
#[derive(Clone, Copy, Debug)]
pub struct Call {
    /// As people write it.
    pub name: &'static str,
    /// The kernel's number (`libc::SYS_*`).
    pub number: i64,
    /// Which of them.
    pub only: Only,
    /// What the role needs it for.
    pub why: &'static str,
}

/// An entry: all calls of this number.
pub const fn any(name: &'static str, number: i64, why: &'static str) -> Call {
    when(name, number, Only::Any, why)
}

/// An entry: those of this number that are meant.
pub const fn when(name: &'static str, number: i64, only: Only, why: &'static str) -> Call {
    Call {
        name,
        number,
        only,
        why,
    }
}

fn rule(only: Only) -> Result<Option<SeccompRule>, Boxed> {
    let (index, operator, value) = match only {
        Only::Any => return Ok(None),
        Only::Is(index, value) => (index, SeccompCmpOp::Eq, value),
        Only::Without(index, bits) => (index, SeccompCmpOp::MaskedEq(bits), 0),
    };
    // The kernel takes these arguments as int: a comparison of 64 bits could be led astray.
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)?;
    Ok(Some(SeccompRule::new(vec![condition])?))
}

/// The filter: what is not in the list kills the process.
fn filter(calls: &[Call]) -> Result<BpfProgram, Boxed> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for call in calls {
        let several = rules.contains_key(&call.number);
        let of_number = rules.entry(call.number).or_default();
        match rule(call.only)? {
            // An empty list of rules means any: an entry of a number already there would widen it.
            Some(_) if several && of_number.is_empty() => {}
            Some(rule) => of_number.push(rule),
            None => of_number.clear(),
        }
    }
    let filter = SeccompFilter::new(
        rules,
        SeccompAction::KillProcess,
        SeccompAction::Allow,
        std::env::consts::ARCH.try_into()?,
    )?;
    Ok(filter.try_into()?)
}

/// Holds all threads of this process to the list, for good.
pub(super) fn hold_to(calls: &[Call]) -> Result<(), Boxed> {
    Ok(seccompiler::apply_filter_all_threads(&filter(calls)?)?)
}
