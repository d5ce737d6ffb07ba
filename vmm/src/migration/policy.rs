//! When to stop the VM and send the rest: decided after each round of precopy, from what was measured in it.

use std::time::Duration;

/// How much slower vCPUs become at a time, and at most, in percent of their time.
const SLOWER: u8 = 20;
const SLOWEST: u8 = 80;
/// How much slower the rest goes than the first round, at worst: neighbouring pages went together in that, while each of
/// those that are written here and there costs what many cost there.
const SCATTERED: u32 = 8;
/// Rounds of which each leaves less than this of the one before are getting somewhere.
const PROGRESS: f64 = 0.8;
/// And when the VM could stop already, it goes on running while each leaves less than this: the standstill becomes so much
/// shorter, and all these rounds together take no more than twice the first of them.
const WORTHWHILE: f64 = 0.5;

/// What the user wants.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Goal {
    /// How long the VM may stand still.
    pub(super) downtime: Duration,
    /// How long it may take until then.
    pub(super) timeout: Duration,
    /// What happens after that.
    pub(super) on_timeout: OnTimeout,
}

/// What happens to a migration that takes too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OnTimeout {
    /// The VM stays where it is.
    Cancel,
    /// The VM moves, and stands still for as long as that takes.
    Move,
}

/// What a round of precopy was like.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Round {
    /// How many bytes went out, and in which time.
    pub(super) sent: u64,
    pub(super) took: Duration,
    /// How many bytes of RAM have been written meanwhile, and by devices whose writes are not logged, all they can reach.
    pub(super) dirty: u64,
    /// How many bytes the devices would still send, as far as they can say.
    pub(super) devices: u64,
    /// How long the migration has taken so far.
    pub(super) elapsed: Duration,
}

/// What to do next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// Another round.
    Again,
    /// Another round, with the vCPUs held back for so many percent of their time.
    Slower(u8),
    /// Stop the VM, and send the rest.
    Switch,
    /// It takes too long, and is to be given up.
    GiveUp,
}

/// What has been learnt so far.
#[derive(Debug)]
pub(super) struct Policy {
    goal: Goal,
    /// Bytes in a second.
    bandwidth: f64,
    /// What the round before left over.
    left: Option<f64>,
    slowed: u8,
}

impl Policy {
    pub(super) fn new(goal: Goal) -> Self {
        Self {
            goal,
            bandwidth: 0.0,
            left: None,
            slowed: 0,
        }
    }

    /// How long it would take to send so many bytes; for ever while nothing has been sent.
    pub(super) fn estimate(&self, bytes: u64) -> Duration {
        let seconds = float(bytes) / self.bandwidth;
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// What to do after a round.
    pub(super) fn decide(&mut self, round: &Round) -> Decision {
        let is_first = self.bandwidth == 0.0;
        self.measure(round.sent, round.took);
        let left = round.dirty.saturating_add(round.devices);
        let estimate = self.estimate(left);
        let at_worst = if is_first {
            estimate.saturating_mul(SCATTERED)
        } else {
            estimate
        };
        let before = self.left.replace(float(left));
        let leaves_less_than = |part: f64| before.is_none_or(|before| float(left) < before * part);
        let is_over = round.elapsed >= self.goal.timeout;
        if left == 0 || at_worst <= self.goal.downtime {
            return if left > 0 && !is_over && leaves_less_than(WORTHWHILE) {
                Decision::Again
            } else {
                Decision::Switch
            };
        }
        if is_over {
            return match self.goal.on_timeout {
                OnTimeout::Cancel => Decision::GiveUp,
                OnTimeout::Move => Decision::Switch,
            };
        }
        if !leaves_less_than(PROGRESS) && self.slowed < SLOWEST {
            self.slowed += SLOWER;
            // What the next round leaves is compared with a round at the same pace.
            self.left = None;
            return Decision::Slower(self.slowed);
        }
        Decision::Again
    }

    /// The link's speed, as the larger rounds tell it: a small one says more about latency.
    pub(super) fn measure(&mut self, sent: u64, took: Duration) {
        const ENOUGH: u64 = 1 << 20;
        let seconds = took.as_secs_f64();
        if seconds > 0.0 && (sent >= ENOUGH || self.bandwidth == 0.0) {
            self.bandwidth = float(sent) / seconds;
        }
    }

    /// The link's speed, as far as it is known.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "it is not negative, and too fast is fast enough"
    )]
    pub(super) fn bytes_per_second(&self) -> u64 {
        self.bandwidth as u64
    }
}

#[expect(clippy::cast_precision_loss, reason = "an estimate")]
fn float(bytes: u64) -> f64 {
    bytes as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    const GOAL: Goal = Goal {
        downtime: Duration::from_millis(100),
        timeout: Duration::from_secs(600),
        on_timeout: OnTimeout::Cancel,
    };

    /// Migrates a VM of so many MiB that writes `rate` MiB of them in a second over a link of `bandwidth` MiB in a
    /// second. Returns the last decision, how slow the VM was in the end, and the seconds that it will stand still.
    fn simulate(goal: Goal, ram: f64, rate: f64, bandwidth: f64) -> (Decision, u8, f64) {
        simulate_scattered(goal, ram, rate, bandwidth, bandwidth)
    }

    /// The same, with another bandwidth for pages that are written here and there.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "what it simulates are megabytes"
    )]
    fn simulate_scattered(
        goal: Goal,
        ram: f64,
        rate: f64,
        bandwidth: f64,
        scattered: f64,
    ) -> (Decision, u8, f64) {
        let mut policy = Policy::new(goal);
        let (mut dirty, mut slowed, mut elapsed) = (ram, 0, 0.0);
        for round in 0..10_000 {
            let sent = dirty;
            let took = sent / if round == 0 { bandwidth } else { scattered };
            elapsed += took;
            dirty = (rate * (100.0 - f64::from(slowed)) / 100.0 * took).min(ram);
            let bytes = |mib: f64| (mib * MIB as f64) as u64;
            let decision = policy.decide(&Round {
                sent: bytes(sent),
                took: Duration::from_secs_f64(took),
                dirty: bytes(dirty),
                devices: 0,
                elapsed: Duration::from_secs_f64(elapsed),
            });
            match decision {
                Decision::Again => {}
                Decision::Slower(percent) => slowed = percent,
                end => return (end, slowed, dirty / scattered),
            }
        }
        panic!("it never ends");
    }

    #[test]
    fn scattered_pages_do_not_outlast_the_downtime() {
        for rate in [1.0, 5.0, 9.0, 50.0] {
            let (decision, _, downtime) = simulate_scattered(GOAL, 512.0, rate, 1000.0, 130.0);
            assert_eq!(decision, Decision::Switch);
            assert!(downtime <= 0.1, "{rate}: {downtime}");
        }
    }

    #[test]
    fn an_idle_vm_moves_after_one_round() {
        assert_eq!(
            simulate(GOAL, 512.0, 0.0, 1000.0),
            (Decision::Switch, 0, 0.0)
        );
    }

    #[test]
    fn a_vm_that_the_link_outruns_is_not_slowed() {
        for rate in [1.0, 100.0, 500.0, 750.0] {
            let (decision, slowed, downtime) = simulate(GOAL, 8192.0, rate, 1000.0);
            assert_eq!((decision, slowed), (Decision::Switch, 0), "{rate}");
            assert!(downtime <= 0.1);
        }
    }

    #[test]
    fn a_vm_that_outruns_the_link_is_slowed_no_more_than_it_takes() {
        let (decision, slowed, downtime) = simulate(GOAL, 8192.0, 1500.0, 1000.0);
        assert_eq!(decision, Decision::Switch);
        assert!((40..=60).contains(&slowed), "{slowed}");
        assert!(downtime <= 0.1);
    }

    #[test]
    fn a_vm_that_cannot_be_slowed_enough_stays_or_goes() {
        let (decision, slowed, _) = simulate(GOAL, 8192.0, 9000.0, 1000.0);
        assert_eq!((decision, slowed), (Decision::GiveUp, SLOWEST));
        let goal = Goal {
            on_timeout: OnTimeout::Move,
            ..GOAL
        };
        let (decision, _, downtime) = simulate(goal, 8192.0, 9000.0, 1000.0);
        assert_eq!(decision, Decision::Switch);
        assert!(downtime > 0.1);
    }

    #[test]
    fn it_goes_on_while_that_shortens_the_standstill() {
        // After the first round, a tenth of a second would do, and after a few more of them less than a page is left.
        let (decision, slowed, downtime) = simulate(GOAL, 512.0, 100.0, 1000.0);
        assert_eq!((decision, slowed), (Decision::Switch, 0));
        assert!(downtime < 1e-5, "{downtime}");
        // What each round leaves again is left at once.
        let mut policy = Policy::new(GOAL);
        let mut decide = |dirty| {
            policy.decide(&Round {
                sent: 1000 * MIB,
                took: Duration::from_secs(1),
                dirty,
                devices: 0,
                elapsed: Duration::from_secs(1),
            })
        };
        assert_eq!(decide(MIB), Decision::Again);
        assert_eq!(decide(MIB / 4), Decision::Again);
        assert_eq!(decide(MIB / 4), Decision::Switch);
    }

    #[test]
    fn what_devices_have_counts() {
        let mut policy = Policy::new(GOAL);
        let mut round = Round {
            sent: 1000 * MIB,
            took: Duration::from_secs(1),
            dirty: 0,
            devices: 200 * MIB,
            elapsed: Duration::from_secs(1),
        };
        assert_eq!(policy.decide(&round), Decision::Again);
        round.devices = 99 * MIB;
        assert_eq!(policy.decide(&round), Decision::Again, "it shrinks");
        round.devices = 98 * MIB;
        assert_eq!(policy.decide(&round), Decision::Switch);
    }

    #[test]
    fn small_rounds_say_nothing_of_the_link() {
        let mut policy = Policy::new(GOAL);
        assert_eq!(policy.estimate(1), Duration::MAX);
        let round = Round {
            sent: 1000 * MIB,
            took: Duration::from_secs(1),
            dirty: 500 * MIB,
            devices: 0,
            elapsed: Duration::from_secs(1),
        };
        policy.decide(&round);
        let small = Round {
            sent: 4096,
            took: Duration::from_secs(1),
            ..round
        };
        policy.decide(&small);
        assert_eq!(policy.estimate(1000 * MIB), Duration::from_secs(1));
    }
}
