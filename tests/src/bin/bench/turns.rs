//! Contenders take turns, so that what else goes on in the machine disturbs all of them alike.

use anyhow::Context;

use crate::measurement::{Definition, Measurement, Series};

/// Those who are measured at the same time, each of whose turns has a result.
pub(crate) struct Turns<'a, T> {
    contenders: Vec<Contender<'a, T>>,
}

struct Contender<'a, T> {
    role: Role,
    turn: Turn<'a, T>,
    results: Vec<T>,
    /// Why it is out, if it is.
    failure: Option<anyhow::Error>,
}

type Turn<'a, T> = Box<dyn FnMut() -> anyhow::Result<T> + 'a>;

enum Role {
    Ours,
    Peer(&'static str),
    Limit,
}

impl<'a, T> Turns<'a, T> {
    /// With ours alone.
    pub(crate) fn new(ours: impl FnMut() -> anyhow::Result<T> + 'a) -> Self {
        let mut turns = Self {
            contenders: Vec::new(),
        };
        turns.add(Role::Ours, ours);
        turns
    }

    /// With a peer, too.
    pub(crate) fn peer(
        &mut self,
        name: &'static str,
        turn: impl FnMut() -> anyhow::Result<T> + 'a,
    ) {
        self.add(Role::Peer(name), turn);
    }

    /// With what nobody can do better than.
    pub(crate) fn limit(&mut self, turn: impl FnMut() -> anyhow::Result<T> + 'a) {
        self.add(Role::Limit, turn);
    }

    fn add(&mut self, role: Role, turn: impl FnMut() -> anyhow::Result<T> + 'a) {
        self.contenders.push(Contender {
            role,
            turn: Box::new(turn),
            results: Vec::new(),
            failure: None,
        });
    }

    /// Gives everyone so many turns, after one that does not count. A peer that fails is out.
    ///
    /// # Errors
    /// When it is not a peer that fails.
    pub(crate) fn take(mut self, rounds: usize) -> anyhow::Result<Results<T>> {
        for round in 0..=rounds {
            for contender in &mut self.contenders {
                if contender.failure.is_some() {
                    continue;
                }
                match (contender.turn)() {
                    Ok(result) if round > 0 => contender.results.push(result),
                    Ok(_) => {}
                    Err(error) => match contender.role {
                        Role::Ours => return Err(error).context("cannot measure Outrigger"),
                        Role::Limit => return Err(error).context("cannot measure the limit"),
                        Role::Peer(_) => contender.failure = Some(error),
                    },
                }
            }
        }
        let mut results = Results {
            ours: Vec::new(),
            peers: Vec::new(),
            limit: None,
            failures: Vec::new(),
        };
        for contender in self.contenders {
            match (contender.role, contender.failure) {
                (Role::Ours, _) => results.ours = contender.results,
                (Role::Limit, _) => results.limit = Some(contender.results),
                (Role::Peer(name), None) => results.peers.push((name, contender.results)),
                (Role::Peer(name), Some(error)) => results.failures.push((name, error)),
            }
        }
        Ok(results)
    }
}

/// What everybody's turns have shown.
#[derive(Debug)]
pub(crate) struct Results<T> {
    ours: Vec<T>,
    peers: Vec<(&'static str, Vec<T>)>,
    limit: Option<Vec<T>>,
    /// Peers that could not be measured, and why.
    pub(crate) failures: Vec<(&'static str, anyhow::Error)>,
}

impl<T> Results<T> {
    /// One number of each turn.
    pub(crate) fn measurement(
        &self,
        definition: &'static Definition,
        number: impl Fn(&T) -> f64,
    ) -> Measurement {
        let series = |results: &[T]| results.iter().map(&number).collect::<Series>();
        let peers = self.peers.iter();
        Measurement {
            definition,
            case: None,
            ours: series(&self.ours),
            peers: peers
                .map(|(name, results)| ((*name).to_owned(), series(results)))
                .collect(),
            limit: self.limit.as_deref().map(series),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use anyhow::bail;

    use super::*;
    use crate::measurement::Better;

    const NUMBER: Definition = Definition {
        key: "number",
        what: "a number",
        unit: "",
        better: Better::Less,
        limit: None,
        aims: &[],
    };

    #[test]
    fn everyone_has_a_turn_in_each_round_and_the_first_does_not_count() {
        let order = RefCell::new(String::new());
        let turn = |name: char| {
            let order = &order;
            move || {
                order.borrow_mut().push(name);
                Ok(order.borrow().len() as f64)
            }
        };
        let mut turns = Turns::new(turn('o'));
        turns.peer("peer", turn('p'));
        turns.limit(turn('l'));
        let results = turns.take(2).unwrap();
        assert_eq!(*order.borrow(), "oploplopl");
        let measurement = results.measurement(&NUMBER, |number| *number);
        assert_eq!(measurement.ours, Series(vec![4.0, 7.0]));
        assert_eq!(
            measurement.peers,
            [("peer".to_owned(), Series(vec![5.0, 8.0]))]
        );
        assert_eq!(measurement.limit, Some(Series(vec![6.0, 9.0])));
    }

    #[test]
    fn peer_that_fails_is_out() {
        let mut asked = 0;
        let mut turns = Turns::new(|| Ok(1.0));
        turns.peer("peer", || {
            asked += 1;
            bail!("broken")
        });
        let results = turns.take(3).unwrap();
        assert_eq!(results.failures.len(), 1);
        let measurement = results.measurement(&NUMBER, |number| *number);
        assert_eq!(measurement.ours.0.len(), 3);
        assert!(measurement.peers.is_empty());
        drop(results);
        assert_eq!(asked, 1);
    }

    #[test]
    fn without_ours_there_is_nothing() {
        let turns = Turns::new(|| -> anyhow::Result<f64> { bail!("broken") });
        assert!(turns.take(3).is_err());
    }
}
