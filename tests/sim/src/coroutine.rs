//! Threads of the simulation as stackful coroutines of one OS thread: each runs until it pauses.
#![allow(unsafe_code)] // The running coroutine finds its way back to the scheduler by a pointer.

use corosensei::stack::DefaultStack;
use corosensei::{Coroutine, CoroutineResult, Yielder};
use std::cell::{Cell, RefCell};
use std::ptr;
use vfio_shim::model::Wait;

/// Room for each: only what is touched takes memory.
const STACK_BYTES: usize = 1 << 20;

/// Why a coroutine stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// It could go on.
    Ready,
    /// It waits for another, or for this time.
    Idle(Wait),
}

type Way = Yielder<(), Pause>;

thread_local! {
    static CURRENT: Cell<*const Way> = const { Cell::new(ptr::null()) };
    static DYING: Cell<bool> = const { Cell::new(false) };
    static STACKS: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// Whether this is inside of a coroutine.
pub fn is_inside() -> bool {
    !CURRENT.get().is_null()
}

/// Whether this is inside of a coroutine that is killed: its destructors run, and must not wait.
pub fn is_dying() -> bool {
    DYING.get()
}

/// Lets others run. Outside of a coroutine, or in one that is killed, nothing happens.
pub fn pause(why: Pause) {
    let me = CURRENT.get();
    if me.is_null() || DYING.get() {
        return;
    }
    // SAFETY: it points to the yielder of the coroutine that runs now: `Thread::resume` clears it
    // when control returns there, and it is set only at that coroutine's start and just below. The
    // yielder lives on the coroutine's own stack for as long as it runs.
    unsafe { (*me).suspend(why) };
    CURRENT.set(me);
}

/// One thread.
pub struct Thread {
    coroutine: Option<Coroutine<(), Pause, (), DefaultStack>>,
}

impl Thread {
    /// It begins to run at the first `resume`.
    pub fn new(run: Box<dyn FnOnce()>) -> Self {
        let pooled = STACKS.with_borrow_mut(Vec::pop);
        let stack = pooled.unwrap_or_else(|| DefaultStack::new(STACK_BYTES).expect("a stack"));
        let coroutine = Coroutine::with_stack(stack, move |way: &Way, ()| {
            CURRENT.set(way);
            run();
        });
        Self {
            coroutine: Some(coroutine),
        }
    }

    /// Runs it until it pauses; `None` when it has ended. A panic in it goes on here.
    pub fn resume(&mut self) -> Option<Pause> {
        let coroutine = self.coroutine.as_mut()?;
        assert!(!is_inside(), "a coroutine resumes another");
        let result =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| coroutine.resume(())));
        CURRENT.set(ptr::null());
        match result {
            Ok(CoroutineResult::Yield(why)) => Some(why),
            Ok(CoroutineResult::Return(())) => {
                let ended = self.coroutine.take()?;
                STACKS.with_borrow_mut(|stacks| stacks.push(ended.into_stack()));
                None
            }
            Err(panic) => {
                self.coroutine = None;
                std::panic::resume_unwind(panic)
            }
        }
    }
}

impl Drop for Thread {
    /// As a process that is killed: it does nothing any more but to free its memory.
    fn drop(&mut self) {
        let Some(mut coroutine) = self.coroutine.take() else {
            return;
        };
        let outer = (CURRENT.replace(ptr::null()), DYING.replace(true));
        coroutine.force_unwind();
        CURRENT.set(outer.0);
        DYING.set(outer.1);
        STACKS.with_borrow_mut(|stacks| stacks.push(coroutine.into_stack()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    #[test]
    fn a_thread_goes_on_where_it_paused_and_ends_once() {
        let steps = Rc::new(RefCell::new(Vec::new()));
        let theirs = Rc::clone(&steps);
        let mut thread = Thread::new(Box::new(move || {
            for step in 0..2 {
                theirs.borrow_mut().push(step);
                pause(Pause::Ready);
            }
        }));
        assert_eq!(thread.resume(), Some(Pause::Ready));
        assert_eq!(*steps.borrow(), [0]);
        assert_eq!(thread.resume(), Some(Pause::Ready));
        assert_eq!(thread.resume(), None);
        assert_eq!(thread.resume(), None);
        assert_eq!(*steps.borrow(), [0, 1]);
    }

    #[test]
    fn a_killed_thread_frees_what_it_has_and_its_destructors_do_not_wait() {
        struct Waits(Rc<Cell<bool>>);
        impl Drop for Waits {
            fn drop(&mut self) {
                assert!(is_dying());
                pause(Pause::Ready);
                self.0.set(true);
            }
        }
        let freed = Rc::new(Cell::new(false));
        let waits = Waits(Rc::clone(&freed));
        let mut thread = Thread::new(Box::new(move || {
            let _waits = waits;
            pause(Pause::Ready);
            panic!("it went on");
        }));
        thread.resume();
        drop(thread);
        assert!(freed.get() && !is_dying() && !is_inside());
    }
}
