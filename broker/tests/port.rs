//! Ports apart from their daemons: daemons are killed, frozen and replaced under a guest's work, and leases reconcile.

#[allow(dead_code, reason = "each test program uses a part of it")]
mod apart;
#[allow(dead_code, reason = "each test program uses a part of it")]
mod soft;

use apart::{Daemon, Rig};
use rustix::process::Signal;
use soft::{Vmm, freeze, signal, until};
use std::os::{fd::AsFd, unix::net::UnixStream};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};
use sublet::config::Config;
use sublet::daemon::{
    Host,
    control::{Deadlines, serve},
    socket::ControlSocket,
    vocabulary::*,
};
use sublet::pool::{Cause, LeaseStore, Move, RedbStore, Scrubbed};
use sublet::port::{leases_socket, verbs_socket};
use vfio_shim::ntb::soft::{Fault, FaultPlan};

/// How soon a daemon that comes back tells the truth.
const TRUTH: Duration = Duration::from_secs(2);

fn lent(daemon: &Daemon, at: usize) -> LentStatus {
    let status = daemon.status();
    let mut lent = status.lent.into_iter();
    let found = lent.find(|lent| lent.fdid == apart::fdid(at));
    found.unwrap_or_else(|| panic!("function {at} is not lent: {:?}", daemon.status()))
}

#[test]
fn daemons_killed_under_a_guests_work_come_back_to_the_same_lease() {
    let mut rig = Rig::new(&["ntb0"]);
    rig.offer(0, "ntb0");
    let told = rig.borrow(0).unwrap();
    let mut vmm = Vmm::at(&rig.guest_socket(0)).unwrap();
    vmm.work().unwrap();
    let before = lent(&rig.lender, 0);
    assert_eq!(before.lease, Some(told.lease));
    assert_eq!(
        before.ttl_ms, None,
        "its clock stands while its path is open"
    );

    rig.lender.kill();
    rig.borrower.kill();
    for seed in 3..20 {
        vmm.copy(seed).unwrap();
    }
    let started = Instant::now();
    rig.start_daemons();
    let (now, borrowed) = until("the truth", || {
        let borrowed = rig.borrower.status().borrowed.pop()?;
        let mut status = rig.lender.status();
        let lent = status.lent.pop()?;
        let told = lent.epoch.is_some() && status.ports[0].last_error.is_none();
        told.then_some((lent, borrowed))
    });
    let took = started.elapsed();
    println!("both daemons started, and told the truth after {took:?}");
    assert!(took < TRUTH, "{took:?}");
    assert_eq!((now.lease, now.epoch), (before.lease, before.epoch));
    assert!(now.age_ms.is_some(), "it is in force in the store, too");
    assert_eq!((now.state, now.ttl_ms), (Availability::InUse, None));
    assert_eq!(
        (borrowed.lease, borrowed.state.as_str()),
        (told.lease, "connected")
    );
    let raised = |lent: &LentStatus| lent.vectors.iter().map(|v| v.raised).sum::<u64>();
    assert!(raised(&now) >= raised(&before) + 17, "interrupts went on");
    vmm.copy(20).unwrap();

    drop(vmm);
    rig.give_back(0).unwrap();
    let over = lent(&rig.lender, 0);
    assert_eq!(over.last_end.as_deref(), Some("returned"));
    assert_eq!((over.lease, over.state), (None, Availability::Available));
    rig.lender
        .verb(Verb::Unavailable { bdf: apart::bdf(0) })
        .unwrap();
    rig.lender
        .verb(Verb::Remove { bdf: apart::bdf(0) })
        .unwrap();
    assert_eq!(rig.lender.list(), []);
}

#[test]
fn lease_that_ended_without_a_daemon_is_ended_in_the_store_and_the_open_one_is_kept() {
    let mut rig = Rig::new(&["ntb0"]);
    for at in 0..3 {
        rig.offer(at, "ntb0");
    }
    let epochs = [0, 1].map(|at| rig.borrow(at).unwrap().lease);
    let vmms = [0, 1].map(|at| Vmm::at(&rig.guest_socket(at)).unwrap());
    until("open paths", || {
        let open = |at| lent(&rig.lender, at).ttl_ms.is_none();
        (open(0) && open(1)).then_some(())
    });
    rig.lender.kill();
    let [over, mut kept] = vmms;
    drop(over);
    // A path is undone without a daemon; a new lease needs one, and says so.
    rig.give_back(0).unwrap();
    let refused = rig.borrow(2).unwrap_err();
    assert!(
        refused.text.contains("start `sublet daemon` on the lender"),
        "{refused}"
    );
    kept.copy(7).unwrap();

    rig.lender = rig.start_lender();
    until("the truth", || rig.lender.status().lent.first()?.epoch);
    assert_eq!(lent(&rig.lender, 0).last_end.as_deref(), Some("returned"));
    let now = lent(&rig.lender, 1);
    assert_eq!((now.lease, now.epoch), (Some(epochs[1]), Some(epochs[1].0)));
    // Lent on, with an epoch of its own.
    assert!(rig.borrow(2).unwrap().lease > epochs[1]);

    rig.lender.kill();
    let mut store = RedbStore::open(&rig.lender_config().state).unwrap();
    let ends: Vec<_> = store
        .journal(99)
        .unwrap()
        .into_iter()
        .filter_map(|entry| match entry.moved {
            Move::Ended(end) => Some((entry.epoch, end.cause)),
            _ => None,
        })
        .collect();
    assert_eq!(
        ends,
        [(epochs[0].0, Cause::Returned)],
        "once, and as it was"
    );
}

#[test]
fn port_that_has_gone_costs_its_own_leases_and_the_other_port_goes_on() {
    let mut rig = Rig::new(&["ntb0", "ntb1"]);
    rig.offer(0, "ntb0");
    rig.offer(1, "ntb1");
    for at in [0, 1] {
        rig.borrow(at).unwrap();
    }
    let mut vmm = Vmm::at(&rig.guest_socket(1)).unwrap();
    vmm.work().unwrap();
    rig.stop_port(4, "ntb0");
    let status = until("the end of a port", || {
        let status = rig.lender.status();
        (!status.ports[0].process.as_ref()?.answers).then_some(status)
    });
    let error = status.ports[0].last_error.clone().unwrap();
    let file = rig.lender.file.display();
    assert_eq!(
        error,
        format!("no process serves port `ntb0`: start `sublet port ntb0 --config {file}`")
    );
    assert_eq!(status.lent.len(), 1, "the other's");
    assert!(
        rig.lender
            .list()
            .iter()
            .any(|entry| entry.fdid == apart::fdid(1))
    );
    let refused = rig.available(0, "ntb0").unwrap_err();
    assert_eq!(refused.code, ErrorCode::PortAway);
    vmm.copy(9).unwrap();
    // Back again, with nothing: the lease of its former life is over.
    rig.start_port(4, "ntb0");
    rig.wait_sessions();
    rig.offer(0, "ntb0");
    let over = lent(&rig.lender, 0);
    assert_eq!(over.last_end.as_deref(), Some("reclaimed"));
    vmm.copy(10).unwrap();
}

/// A port that takes calls, and never answers.
fn hanging(config: &Config, name: &str) -> [ControlSocket; 2] {
    std::fs::create_dir_all(config.port_folder(name)).unwrap();
    [
        ControlSocket::claim(&verbs_socket(config, name)).unwrap(),
        ControlSocket::claim_packets(&leases_socket(config, name)).unwrap(),
    ]
}

#[test]
fn port_that_hangs_costs_its_own_lines_and_a_daemon_waits_for_none() {
    let mut rig = Rig::new(&["ntb0", "ntb1"]);
    rig.offer(0, "ntb0");
    rig.stop_port(4, "ntb1");
    let _hanging = hanging(&rig.lender_config(), "ntb1");
    rig.lender.kill();
    rig.lender = rig.start_lender();
    for _ in 0..3 {
        let started = Instant::now();
        let status = rig.lender.status();
        let took = started.elapsed();
        assert!(took < Duration::from_secs(4), "{took:?}");
        assert_eq!(status.ports[0].session.state, "open");
        let error = status.ports[1].last_error.clone().unwrap();
        assert!(error.contains("does not answer"), "{error}");
    }
    let Ok(Outcome::PartOfList(part)) = rig.lender.verb(Verb::List) else {
        panic!("no part of a list");
    };
    assert_eq!(part.missing.len(), 1);
    assert!(
        part.entries
            .iter()
            .any(|entry| entry.fdid == apart::fdid(0))
    );
    rig.borrow(0).unwrap();
}

const FULL: &str = "1 functions are borrowed for trust domain `lab`, its limit: return one first, \
                    or raise limits.functions_per_domain";

fn two_ports_with_one_function_for_a_domain() -> Rig {
    let rig = Rig::limited(&["ntb0", "ntb1"], "functions_per_domain = 1");
    rig.offer(0, "ntb0");
    rig.offer(1, "ntb1");
    rig
}

fn assert_full(refused: Result<BorrowedFunction, VerbError>, words: &str) {
    let refused = refused.unwrap_err();
    assert_eq!((refused.code, &refused.text[..]), (ErrorCode::Limit, words));
}

#[test]
fn trust_domain_has_as_many_functions_over_all_ports_as_it_may_and_not_one_more() {
    let mut rig = two_ports_with_one_function_for_a_domain();
    rig.borrow(0).unwrap();
    assert_full(rig.borrow(1), FULL);
    rig.borrow_for(1, Some("other")).unwrap();
    rig.give_back(1).unwrap();
    rig.borrower.kill();
    rig.start_borrower();
    rig.wait_sessions();
    assert_full(rig.borrow(1), FULL);
    rig.give_back(0).unwrap();
    rig.borrow(1).unwrap();
    assert_full(rig.borrow(0), FULL);
    // A port that has gone has nothing.
    rig.stop_port(8, "ntb1");
    rig.borrow(0).unwrap();
}

#[test]
fn of_two_borrows_at_once_through_two_ports_the_limit_lets_one_in() {
    let rig = two_ports_with_one_function_for_a_domain();
    for _ in 0..4 {
        let answers = std::thread::scope(|scope| {
            let borrow = |at| {
                scope.spawn({
                    let rig = &rig;
                    move || rig.borrow(at)
                })
            };
            [0, 1].map(borrow).map(|verb| verb.join().unwrap())
        });
        let got = answers.iter().position(Result::is_ok).unwrap();
        let [first, second] = answers;
        assert_full(if got == 0 { second } else { first }, FULL);
        rig.give_back(got).unwrap();
    }
}

#[test]
fn port_that_hangs_is_counted_with_what_it_may_have() {
    let mut rig = two_ports_with_one_function_for_a_domain();
    rig.stop_port(8, "ntb0");
    let _hanging = hanging(&Config::load(&rig.borrower.file).unwrap(), "ntb0");
    // It had nothing when it was last heard of.
    rig.borrow(1).unwrap();
    rig.give_back(1).unwrap();
    rig.borrower.kill();
    rig.start_borrower();
    let silent = "Counted is what port `ntb0` last said, or the most that it may have, as it does \
                  not answer: see `sublet status`";
    assert_full(rig.borrow(1), &format!("{FULL}. {silent}"));
}

#[test]
fn of_two_ports_to_one_node_by_its_word_alone_a_daemon_takes_neither() {
    let mut rig = Rig::new(&["ntb0", "ntb1"]);
    rig.offer(0, "ntb1");
    rig.borrower.kill();
    let file = std::fs::read_to_string(&rig.borrower.file).unwrap();
    let without = |of: &str| {
        file.replacen("peer_node = 4\n", "", 2)
            .replace(of, &format!("{of}peer_node = 4\n"))
    };
    std::fs::write(&rig.borrower.file, without("nobody")).unwrap();
    rig.start_borrower();
    rig.wait_sessions();
    let refused = rig.borrow(0).unwrap_err();
    assert_eq!(refused.code, ErrorCode::Config, "{refused}");
    assert!(refused.text.contains("peer_node = 4"), "{refused}");
    // Its ports may tell what they like: what the daemon's own configuration says counts.
    rig.borrower.kill();
    std::fs::write(&rig.borrower.file, without("name = \"ntb0\"\n")).unwrap();
    rig.start_borrower();
    rig.wait_sessions();
    let refused = rig.borrow(0).unwrap_err();
    assert_eq!(refused.code, ErrorCode::UnknownFunction, "{refused}");
    std::fs::write(&rig.borrower.file, without("name = \"ntb1\"\n")).unwrap();
    rig.borrower.kill();
    rig.start_borrower();
    rig.wait_sessions();
    rig.borrow(0).unwrap();
}

/// A port that was taken over: it says that it has this function, and to any verb that it is done.
struct Liar(Mutex<Vec<Verb>>, LentStatus);

impl Host for Liar {
    fn handle(&self, verb: Verb) -> Result<Outcome, VerbError> {
        self.0.lock().unwrap().push(verb.clone());
        match verb {
            Verb::Status => Ok(Outcome::Status(Box::new(HostStatus {
                lent: vec![self.1.clone()],
                ..HostStatus::default()
            }))),
            _ => Ok(Outcome::Done),
        }
    }

    fn stop(&self) {}
}

#[test]
fn port_that_says_it_has_anothers_function_swallows_no_verb() {
    let mut rig = Rig::new(&["ntb0", "ntb1"]);
    rig.offer(0, "ntb1");
    rig.borrow(0).unwrap();
    let liar = Arc::new(Liar(Mutex::default(), lent(&rig.lender, 0)));
    rig.stop_port(4, "ntb0");
    let [verbs, _line] = hanging(&rig.lender_config(), "ntb0");
    let (stop, stopped) = UnixStream::pair().unwrap();
    let host: Arc<dyn Host> = liar.clone();
    let serving =
        thread::spawn(move || serve(&verbs, &host, stopped.as_fd(), Deadlines::default()));
    let bdf = apart::bdf(0);
    let deadline_s = None;
    rig.lender.verb(Verb::Revoke { bdf, deadline_s }).unwrap();
    let at_the_right_one = until("the end of the lease", || {
        let mut lent = rig.lender.status().lent.into_iter();
        lent.find(|lent| lent.lease.is_none())
    });
    assert!(at_the_right_one.last_end.unwrap().contains("revoked"));
    let verbs = liar.0.lock().unwrap();
    assert!(verbs.iter().any(|verb| matches!(verb, Verb::Revoke { .. })));
    drop(stop);
    serving.join().unwrap().unwrap();
}

#[test]
fn second_daemon_of_a_port_is_refused_and_tells_which_is_the_first() {
    let rig = Rig::new(&["ntb0"]);
    let second = rig.start_daemon_beside();
    let pid = rig.lender.pid();
    until("a refusal", || {
        let error = second.status().ports[0].last_error.clone()?;
        error
            .contains(&format!("process {pid} is its daemon"))
            .then_some(())
    });
    rig.offer(0, "ntb0");
    rig.borrow(0).unwrap();
}

#[test]
fn frozen_daemon_holds_no_path_up_and_goes_on_where_it_was() {
    let rig = Rig::new(&["ntb0"]);
    rig.offer(0, "ntb0");
    let lease = rig.borrow(0).unwrap().lease;
    let mut vmm = Vmm::at(&rig.guest_socket(0)).unwrap();
    vmm.work().unwrap();
    freeze(rig.lender.pid());
    for seed in 3..9 {
        vmm.copy(seed).unwrap();
    }
    drop(vmm);
    rig.give_back(0).unwrap();
    signal(rig.lender.pid(), Signal::CONT);
    until("the end of the lease", || {
        let lent = lent(&rig.lender, 0);
        (lent.lease.is_none() && lent.last_end.as_deref() == Some("returned")).then_some(())
    });
    assert!(rig.borrow(0).unwrap().lease > lease);
}

fn quarantine(daemon: &Daemon) -> Vec<FdidText> {
    match daemon.verb(Verb::Quarantine).unwrap() {
        Outcome::Quarantine(list) => list.functions.into_iter().map(|one| one.fdid).collect(),
        other => panic!("{other:?}"),
    }
}

fn retry(rig: &Rig) -> Result<Outcome, VerbError> {
    let (bdf, held) = (apart::bdf(0), None);
    rig.lender.verb(Verb::QuarantineRetry { bdf, held })
}

/// Function 0 could not be reset out of its tenant.
fn spoil(rig: &Rig) {
    rig.borrow(0).unwrap();
    next_reset_fails(rig);
    let revoke = Verb::Revoke {
        bdf: apart::bdf(0),
        deadline_s: None,
    };
    rig.lender.verb(revoke).unwrap();
    until("it is written down", || {
        let add = rig.lender.verb(Verb::Add { bdf: apart::bdf(0) });
        add.is_err_and(|refusal| refusal.code == ErrorCode::Quarantine)
            .then_some(())
    });
    until("the borrower is told", || {
        let held = rig.borrower.status().borrowed.pop()?;
        (held.state == "lost").then_some(())
    });
    rig.give_back(0).unwrap();
}

fn next_reset_fails(rig: &Rig) {
    let plan = FaultPlan::default().nth(Fault::ResetFails, 1);
    rig.function(0).arm(plan);
}

fn assert_held_back(rig: &Rig) {
    assert_eq!(quarantine(&rig.lender), [apart::fdid(0)]);
    for refusal in [
        rig.lender
            .verb(Verb::Add { bdf: apart::bdf(0) })
            .unwrap_err(),
        rig.available(0, "ntb0").unwrap_err(),
    ] {
        assert_eq!(refusal.code, ErrorCode::Quarantine, "{refusal}");
        assert!(
            refusal.text.contains("`sublet quarantine retry"),
            "{refusal}"
        );
    }
}

#[test]
fn function_in_quarantine_stays_in_it_over_the_verbs_a_ports_restart_and_a_daemons() {
    let mut rig = Rig::new(&["ntb0"]);
    rig.offer(0, "ntb0");
    spoil(&rig);
    assert_held_back(&rig);
    let bdf = apart::bdf(0);
    rig.lender.verb(Verb::Unavailable { bdf }).unwrap();
    assert_held_back(&rig);
    let listed = rig.lender.list();
    let own = listed.iter().find(|entry| entry.fdid == apart::fdid(0));
    assert_eq!(own.unwrap().available, Availability::Quarantine);
    rig.lender.verb(Verb::Remove { bdf }).unwrap();
    assert_held_back(&rig);

    rig.stop_port(4, "ntb0");
    rig.start_port(4, "ntb0");
    rig.lender.kill();
    rig.lender = rig.start_lender();
    rig.wait_sessions();
    assert_held_back(&rig);

    next_reset_fails(&rig);
    assert_eq!(retry(&rig).unwrap_err().code, ErrorCode::Quarantine);
    assert_held_back(&rig);
    let resets = rig.function(0).resets();
    assert!(matches!(retry(&rig).unwrap(), Outcome::Undone(_)));
    assert_eq!(rig.function(0).resets(), resets + 1);
    until("it is written down", || {
        quarantine(&rig.lender).is_empty().then_some(())
    });
    rig.offer(0, "ntb0");
    rig.borrow(0).unwrap();
}

#[test]
fn function_offered_behind_the_daemons_back_is_granted_to_nobody_and_found_in_quarantine() {
    let mut rig = Rig::new(&["ntb0"]);
    rig.offer(0, "ntb0");
    spoil(&rig);
    rig.stop_port(4, "ntb0");
    rig.start_port(4, "ntb0");
    rig.wait_sessions();
    // A port that was started anew knows of no lease, and takes verbs from its own user.
    let verbs = verbs_socket(&rig.lender_config(), "ntb0");
    let bdf = apart::bdf(0);
    let port = None;
    for verb in [Verb::Add { bdf }, Verb::Available { bdf, port }] {
        apart::ask(&verbs, &verb).unwrap().unwrap();
    }
    for _ in 0..2 {
        let refusal = rig.borrow(0).unwrap_err();
        assert_eq!(refusal.code, ErrorCode::Quarantine, "{refusal}");
    }
    assert_eq!(lent(&rig.lender, 0).state, Availability::Quarantine);
    let Outcome::Undone(undone) = retry(&rig).unwrap() else {
        panic!("not undone");
    };
    assert_eq!(undone.available, Availability::Available);
    rig.borrow(0).unwrap();

    let clear = Verb::QuarantineClear {
        bdf,
        i_know: true,
        by: None,
    };
    rig.give_back(0).unwrap();
    spoil(&rig);
    rig.lender.verb(clear).unwrap();
    rig.borrow(0).unwrap();
    rig.lender.kill();
    let mut store = RedbStore::open(&rig.lender_config().state).unwrap();
    let mends = store.journal(99).unwrap().into_iter();
    let mends: Vec<_> = mends
        .filter_map(|entry| match entry.moved {
            Move::Mended(how) => Some(how),
            _ => None,
        })
        .collect();
    let user = rustix::process::geteuid().as_raw();
    let cleared = Scrubbed::Cleared(format!("user {user}"));
    assert_eq!(mends, [Scrubbed::Reset, cleared]);
}
