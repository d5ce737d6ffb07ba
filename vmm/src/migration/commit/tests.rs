//! Every order of events, with links cut, processes killed, and messages lost and repeated.

use std::collections::{HashSet, VecDeque};

use super::*;

/// What is said. `State` stands for all that comes before the destination is prepared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Message {
    State,
    Prepared,
    Commit,
    Committed,
    Refused,
    /// The connection has ended.
    End,
}

/// Two processes, none where one has died, and what is on its way between them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    source: Option<Source>,
    destination: Option<Destination>,
    is_sent: bool,
    to_source: VecDeque<Message>,
    to_destination: VecDeque<Message>,
    is_cut: bool,
    /// Whether the source has died before there was another copy.
    died_alone: bool,
    /// The answer to a source in doubt, on another connection.
    answer: Option<Message>,
    /// How much can still go wrong.
    faults: u8,
}

impl World {
    fn new(faults: u8) -> Self {
        Self {
            source: Some(Source::Sending),
            destination: Some(Destination::Receiving),
            is_sent: false,
            to_source: VecDeque::new(),
            to_destination: VecDeque::new(),
            is_cut: false,
            died_alone: false,
            answer: None,
            faults,
        }
    }

    fn with(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut world = self.clone();
        change(&mut world);
        world
    }

    /// What follows if nothing goes wrong.
    fn next(&self) -> Vec<Self> {
        let mut next = Vec::new();
        if self.source == Some(Source::Sending) && !self.is_sent {
            next.push(self.with(|world| {
                world.is_sent = true;
                world.send_to_destination(Message::State);
            }));
        }
        if !self.to_destination.is_empty() {
            next.push(self.with(|world| {
                let message = world.to_destination.pop_front().unwrap();
                world.destination_hears(message);
            }));
        }
        if !self.to_source.is_empty() {
            next.push(self.with(|world| {
                let message = world.to_source.pop_front().unwrap();
                world.source_hears(message);
            }));
        }
        match self.answer {
            Some(answer) => next.push(self.with(|world| {
                world.answer = None;
                world.source_hears(answer);
            })),
            None if self.source == Some(Source::InDoubt) && self.destination.is_some() => {
                next.push(self.with(World::ask));
            }
            None => {}
        }
        // Operators know who is dead.
        if self.source == Some(Source::InDoubt) && self.destination.is_none() {
            next.push(self.with(|world| world.source_does(SourceInput::Forced)));
        }
        if self.destination == Some(Destination::InDoubt) && self.source.is_none() {
            next.push(self.with(|world| {
                world.destination_does(DestinationInput::Forced);
            }));
        }
        next
    }

    /// What can go wrong.
    fn faults(&self) -> Vec<Self> {
        if self.faults == 0 {
            return Vec::new();
        }
        let world = self.with(|world| world.faults -= 1);
        let mut next = Vec::new();
        // What has been sent may arrive before the end does, or not.
        for arrives in 0..=self.to_destination.len() {
            next.push(world.with(|world| {
                world.cut_to_destination(arrives);
                world.source = None;
                world.died_alone = world.destination == Some(Destination::Receiving);
                world.is_cut = true;
                world.to_source.clear();
                world.answer = None;
            }));
            for back in 0..=self.to_source.len() {
                next.push(world.with(|world| {
                    world.cut_to_destination(arrives);
                    world.cut_to_source(back);
                    world.is_cut = true;
                }));
            }
        }
        for arrives in 0..=self.to_source.len() {
            next.push(world.with(|world| {
                world.cut_to_source(arrives);
                world.destination = None;
                world.is_cut = true;
                world.to_destination.clear();
            }));
        }
        next.push(world.with(|world| world.answer = None));
        for to_source in [false, true] {
            next.push(world.with(|world| {
                let queue = match to_source {
                    true => &mut world.to_source,
                    false => &mut world.to_destination,
                };
                if let Some(&first) = queue.front() {
                    queue.push_front(first);
                }
            }));
        }
        if world.source.is_some() {
            next.push(world.with(|world| world.source_does(SourceInput::Failed)));
        }
        if world.destination.is_some() {
            next.push(world.with(|world| {
                world.destination_does(DestinationInput::Failed);
            }));
            // Another asks, or one asks twice.
            next.push(world.with(|world| {
                world.destination_does(DestinationInput::Asked);
            }));
        }
        next
    }

    fn cut_to_destination(&mut self, arrives: usize) {
        if !self.is_cut {
            self.to_destination.truncate(arrives);
            self.to_destination.push_back(Message::End);
        }
    }

    fn cut_to_source(&mut self, arrives: usize) {
        if !self.is_cut {
            self.to_source.truncate(arrives);
            self.to_source.push_back(Message::End);
        }
    }

    fn send_to_destination(&mut self, message: Message) {
        if !self.is_cut {
            self.to_destination.push_back(message);
        }
    }

    fn send_to_source(&mut self, message: Message) {
        if !self.is_cut {
            self.to_source.push_back(message);
        }
    }

    fn source_hears(&mut self, message: Message) {
        self.source_does(match message {
            Message::Prepared => SourceInput::Prepared,
            Message::Committed => SourceInput::Committed,
            Message::Refused => SourceInput::Refused,
            Message::End => SourceInput::Failed,
            Message::State | Message::Commit => unreachable!(),
        });
    }

    fn source_does(&mut self, input: SourceInput) {
        let Some(before) = self.source else { return };
        let source = before.on(input);
        self.source = Some(source);
        match source {
            Source::Committing if before == Source::Sending => {
                self.send_to_destination(Message::Commit);
            }
            // It closes the connection, and what it has sent arrives before that.
            Source::Kept | Source::Gone => {
                self.cut_to_destination(usize::MAX);
                self.is_cut = true;
            }
            Source::Sending | Source::Committing | Source::InDoubt => {}
        }
    }

    fn destination_hears(&mut self, message: Message) {
        self.destination_does(match message {
            Message::State => DestinationInput::Complete,
            Message::Commit => DestinationInput::Commit,
            Message::End => DestinationInput::Lost,
            Message::Prepared | Message::Committed | Message::Refused => unreachable!(),
        });
    }

    /// What it says goes to the migration's connection.
    fn destination_does(&mut self, input: DestinationInput) {
        let said = self.destination_decides(input);
        if let Some(message) = said {
            self.send_to_source(message);
        }
    }

    fn ask(&mut self) {
        self.answer = self.destination_decides(DestinationInput::Asked);
        assert!(self.answer.is_some(), "a question is answered");
    }

    fn destination_decides(&mut self, input: DestinationInput) -> Option<Message> {
        let (destination, action) = self.destination?.on(input);
        self.destination = Some(destination);
        match action {
            DestinationAction::None => None,
            DestinationAction::SayPrepared => Some(Message::Prepared),
            DestinationAction::Run | DestinationAction::SayCommitted => Some(Message::Committed),
            DestinationAction::Discard | DestinationAction::SayRefused => Some(Message::Refused),
        }
    }

    fn source_runs(&self) -> bool {
        matches!(self.source, Some(Source::Sending | Source::Kept))
    }

    fn destination_runs(&self) -> bool {
        self.destination == Some(Destination::Running)
    }
}

/// All worlds that can come to be, with so many faults.
fn worlds(faults: u8) -> HashSet<World> {
    let mut seen = HashSet::from([World::new(faults)]);
    let mut rest = vec![World::new(faults)];
    while let Some(world) = rest.pop() {
        for next in world.next().into_iter().chain(world.faults()) {
            if seen.insert(next.clone()) {
                rest.push(next);
            }
        }
    }
    seen
}

#[test]
fn never_do_both_run() {
    let worlds = worlds(4);
    assert!(worlds.len() > 1000, "{}", worlds.len());
    for world in &worlds {
        assert!(
            !(world.source_runs() && world.destination_runs()),
            "{world:?}"
        );
    }
    // The check would see it: these do happen.
    assert!(worlds.iter().any(World::destination_runs));
    assert!(
        worlds
            .iter()
            .any(|world| world.source == Some(Source::Kept))
    );
    assert!(
        worlds
            .iter()
            .any(|world| world.destination == Some(Destination::InDoubt))
    );
}

#[test]
fn after_one_failure_one_runs() {
    for world in worlds(1) {
        let is_at_rest = world.next().is_empty();
        if !is_at_rest {
            continue;
        }
        // A source that dies before there is another copy takes the VM with it, migration or not.
        let died_alone = world.died_alone && world.destination == Some(Destination::Refused);
        // One that has handed the VM over is not needed, and neither is the VM's end afterwards its concern.
        let died_after = world.source == Some(Source::Gone) && world.destination.is_none();
        let runs = world.source_runs() != world.destination_runs();
        assert!(runs || died_alone || died_after, "{world:?}");
    }
}

#[test]
fn nothing_waits_for_ever() {
    // Each step without a fault leads on: none is taken twice.
    fn depth(world: &World, left: u32) {
        assert!(left > 0, "{world:?}");
        world.next().iter().for_each(|next| depth(next, left - 1));
    }
    for world in worlds(1) {
        depth(&world, 30);
    }
}

#[test]
fn a_source_that_has_not_committed_keeps_the_vm() {
    for input in [SourceInput::Failed, SourceInput::Refused] {
        assert_eq!(Source::Sending.on(input), Source::Kept);
    }
}

#[test]
fn one_that_has_refused_never_runs() {
    use DestinationInput::{Asked, Commit, Complete, Failed, Forced, Lost};
    for input in [Asked, Commit, Complete, Failed, Forced, Lost] {
        assert_eq!(Destination::Refused.on(input).0, Destination::Refused);
    }
}
