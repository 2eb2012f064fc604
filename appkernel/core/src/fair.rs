//! How containers share the CPU: by weight while several want it, and no more than a quota allows.

/// Weight of a container that names none (`cpu.shares`).
pub const USUAL_WEIGHT: u64 = 1024;
/// What Linux takes as weights.
const WEIGHTS: (u64, u64) = (2, 262_144);
/// Nanoseconds of a period that is not named, and what Linux takes.
const USUAL_PERIOD_NS: u64 = 100_000_000;
const PERIODS_NS: (u64, u64) = (1_000_000, 1_000_000_000);
/// Smallest quota, as on Linux.
const LEAST_QUOTA_NS: u64 = 1_000_000;
/// Periods that a container can have used up in advance, at most: by one call that was long.
const MOST_AHEAD: u64 = 10;

/// Reads `cpu.max` of cgroups: quota (`None`: no limit) and period, in nanoseconds.
pub fn parse_max(text: &str) -> Option<(Option<u64>, Option<u64>)> {
    let mut words = text.split_whitespace();
    let ns = |word: &str| Some(word.parse::<u64>().ok()?.saturating_mul(1000));
    let quota = match words.next()? {
        "max" => None,
        word => Some(ns(word)?),
    };
    let period = words.next().map(ns);
    match period {
        Some(period) => Some((quota, Some(period?))),
        None => Some((quota, None)),
    }
}

/// The weight as `cpu.shares` of one as `cpu.weight` has it (1 to 10000, 100 usually).
pub fn shares_of(weight: u64) -> u64 {
    weight.clamp(1, 10_000) * USUAL_WEIGHT / 100
}

/// What may be used in each period.
#[derive(Clone, Copy, Debug)]
struct Quota {
    quota_ns: u64,
    period_ns: u64,
    /// Start of the period.
    start_ns: u64,
    used_ns: u64,
}

impl Quota {
    /// Goes on to the period of `now`; gives how many have passed.
    fn roll(&mut self, now_ns: u64) -> u64 {
        let passed = now_ns.saturating_sub(self.start_ns) / self.period_ns;
        self.start_ns += passed * self.period_ns;
        let allowed = self.quota_ns.saturating_mul(passed);
        self.used_ns = self.used_ns.saturating_sub(allowed);
        passed
    }
}

/// Counts, as in `cpu.stat`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Periods in which it ran.
    pub periods: u64,
    /// How often it had to wait for the next period.
    pub throttled: u64,
    /// Nanoseconds for which it had to.
    pub throttled_ns: u64,
}

/// A container's part of the CPU.
#[derive(Clone, Copy, Debug)]
pub struct Share {
    weight: u64,
    /// Nanoseconds that it had, more of them if its weight is small: who has least is next.
    virtual_ns: u64,
    quota: Option<Quota>,
    throttled_since: Option<u64>,
    statistics: Statistics,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            weight: USUAL_WEIGHT,
            virtual_ns: 0,
            quota: None,
            throttled_since: None,
            statistics: Statistics::default(),
        }
    }
}

impl Share {
    /// Sets the weight (`cpu.shares`).
    pub fn set_weight(&mut self, weight: u64) {
        self.weight = weight.clamp(WEIGHTS.0, WEIGHTS.1);
    }

    /// Sets the quota in nanoseconds for each period; what is `None` stays, `Some(None)` is no quota.
    pub fn set_quota(&mut self, quota: Option<Option<u64>>, period_ns: Option<u64>, now_ns: u64) {
        let old = self.quota;
        let quota = quota.unwrap_or(old.map(|q| q.quota_ns));
        let period = period_ns.or(old.map(|q| q.period_ns));
        let period = period.unwrap_or(USUAL_PERIOD_NS);
        self.quota = quota.map(|ns| Quota {
            quota_ns: ns.max(LEAST_QUOTA_NS),
            period_ns: period.clamp(PERIODS_NS.0, PERIODS_NS.1),
            start_ns: now_ns,
            used_ns: 0,
        });
    }

    /// Whether there is a quota.
    pub fn is_limited(&self) -> bool {
        self.quota.is_some()
    }

    /// It had the CPU for so long.
    pub fn spend(&mut self, now_ns: u64, ns: u64) {
        let weighted = ns.saturating_mul(USUAL_WEIGHT) / self.weight;
        self.virtual_ns = self.virtual_ns.saturating_add(weighted);
        if let Some(quota) = &mut self.quota {
            if quota.roll(now_ns) > 0 {
                self.statistics.periods += 1;
            }
            let most = quota.quota_ns.saturating_mul(MOST_AHEAD);
            quota.used_ns = quota.used_ns.saturating_add(ns).min(most);
        }
    }

    /// When it may run again, if it may not now.
    pub fn waits_until(&mut self, now_ns: u64) -> Option<u64> {
        let until = self.quota.as_mut().and_then(|quota| {
            quota.roll(now_ns);
            let periods = quota.used_ns / quota.quota_ns;
            (periods > 0).then(|| quota.start_ns + periods * quota.period_ns)
        });
        match (until, self.throttled_since) {
            (Some(_), None) => {
                self.throttled_since = Some(now_ns);
                self.statistics.throttled += 1;
            }
            (None, Some(since)) => {
                self.throttled_since = None;
                self.statistics.throttled_ns += now_ns.saturating_sub(since);
            }
            _ => {}
        }
        until
    }

    /// Nanoseconds that it may still have in this period, if that is limited.
    pub fn left_ns(&self) -> Option<u64> {
        self.quota
            .map(|quota| quota.quota_ns.saturating_sub(quota.used_ns))
    }

    /// Quota (`None`: no limit) and period in nanoseconds.
    pub fn limit_ns(&self) -> (Option<u64>, u64) {
        let quota = self.quota.map(|q| q.quota_ns);
        (quota, self.quota.map_or(USUAL_PERIOD_NS, |q| q.period_ns))
    }

    /// The weight (`cpu.shares`).
    pub fn weight(&self) -> u64 {
        self.weight
    }

    /// Who has least is next.
    pub fn virtual_ns(&self) -> u64 {
        self.virtual_ns
    }

    /// It wants the CPU again: for the time that it did not, it gets no more than others.
    pub fn join(&mut self, least_ns: u64) {
        self.virtual_ns = self.virtual_ns.max(least_ns);
    }

    /// Its counts.
    pub fn statistics(&self) -> Statistics {
        self.statistics
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: u64 = 1_000_000;

    /// Plays a program that always wants to run, in steps of 1 ms; gives how many it had.
    fn play(share: &mut Share, from: u64, steps: u64) -> u64 {
        let mut had = 0;
        for now in (from..from + steps).map(|i| i * MS) {
            if share.waits_until(now).is_none() {
                had += 1;
                share.spend(now + MS, MS);
            }
        }
        had
    }

    #[test]
    fn a_quota_is_what_a_busy_container_gets() {
        let mut share = Share::default();
        assert_eq!(play(&mut share, 0, 100), 100);
        share.set_quota(Some(Some(20 * MS)), None, 100 * MS);
        let had = play(&mut share, 100, 1000);
        assert!((195..=205).contains(&had), "{had}");
        let counted = share.statistics();
        assert!((9..=11).contains(&counted.throttled), "{counted:?}");
        assert!(counted.throttled_ns > 700 * MS, "{counted:?}");
        // Half of each 10 ms; then none any more.
        share.set_quota(Some(Some(5 * MS)), Some(10 * MS), 1100 * MS);
        let had = play(&mut share, 1100, 1000);
        assert!((490..=510).contains(&had), "{had}");
        share.set_quota(None, Some(20 * MS), 2100 * MS);
        assert_eq!(share.left_ns(), Some(5 * MS));
        share.set_quota(Some(None), None, 2100 * MS);
        assert_eq!(play(&mut share, 2100, 100), 100);
    }

    #[test]
    fn what_was_used_ahead_is_waited_for_but_not_for_ever() {
        let mut share = Share::default();
        share.set_quota(Some(Some(10 * MS)), Some(100 * MS), 0);
        share.spend(35 * MS, 35 * MS);
        assert_eq!(share.waits_until(35 * MS), Some(300 * MS));
        assert_eq!(share.waits_until(299 * MS), Some(300 * MS));
        assert_eq!(share.waits_until(300 * MS), None);
        share.spend(u64::MAX / 2, u64::MAX / 2);
        let until = share.waits_until(u64::MAX / 2).unwrap();
        assert!(until - u64::MAX / 2 <= MOST_AHEAD * 100 * MS);
        // Times that make no sense, and clocks that stand still.
        assert!(share.waits_until(0).is_some());
        share.set_quota(Some(Some(0)), Some(0), 0);
        assert_eq!(share.waits_until(0), None);
    }

    #[test]
    fn values_of_cgroup_files_are_read() {
        assert_eq!(parse_max("max"), Some((None, None)));
        assert_eq!(parse_max("max 100000\n"), Some((None, Some(100 * MS))));
        assert_eq!(
            parse_max("20000 50000"),
            Some((Some(20 * MS), Some(50 * MS)))
        );
        for bad in ["", "x", "-1", "20000 y"] {
            assert_eq!(parse_max(bad), None);
        }
        assert_eq!(shares_of(100), USUAL_WEIGHT);
    }

    #[test]
    fn weights_divide_the_cpu() {
        let mut shares = [Share::default(), Share::default()];
        shares[0].set_weight(2048);
        shares[1].set_weight(0);
        shares[1].set_weight(512);
        let mut had = [0u32; 2];
        for step in 0..1000 {
            let next = usize::from(shares[1].virtual_ns() < shares[0].virtual_ns());
            shares[next].spend(step * MS, MS);
            had[next] += 1;
        }
        assert!((795..=805).contains(&had[0]), "{had:?}");
        // Whoever slept does not get all of it now.
        let mut late = Share::default();
        late.join(shares[0].virtual_ns());
        assert_eq!(late.virtual_ns(), shares[0].virtual_ns());
    }
}
