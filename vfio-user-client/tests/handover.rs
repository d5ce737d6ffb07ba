//! Connections that go to another process, and servers that do not notice.

#![allow(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use serde_json::{Value, json};
use support::{
    LONG, Memory, Peer, check_alive, connect, dma, good_payload, is_readable, options, start,
};
use vfio_user_client::{
    Client, Command, ConnError, Connected, Descriptors, DmaAccess, Loss, Standing, State,
};

const SHORT: Duration = Duration::from_millis(80);
const TWIN: &str = "\"twin_socket\":{\"supported\":true,\"fd_index\":0},\"max_msg_fds\":8";

/// What another process gets: descriptors of its own, and what has been written down.
fn send(descriptors: &Descriptors) -> Descriptors {
    let sent = descriptors.iter();
    let sent: Vec<_> = sent.map(|fd| fd.try_clone_to_owned().unwrap()).collect();
    Descriptors::from(sent)
}

/// A client that may take over from another.
fn inherit(client: &Client, memory: &Arc<Memory>) -> Client {
    let mut descriptors = Descriptors::default();
    let connected = client.describe(&mut descriptors).unwrap();
    let written = serde_json::to_string(&connected).unwrap();
    let connected: Connected = serde_json::from_str(&written).unwrap();
    let descriptors = send(&descriptors);
    Client::inherit(&connected, &descriptors, memory.clone(), &options(LONG)).unwrap()
}

/// Hands a connection over to a client that waits for it.
fn hand_over(from: &Client, to: &Client) {
    let mut descriptors = Descriptors::default();
    let standing = from.hand_over(LONG, &mut descriptors).unwrap();
    let written = serde_json::to_string(&standing).unwrap();
    let standing: Standing = serde_json::from_str(&written).unwrap();
    to.take_over(&standing, &send(&descriptors)).unwrap();
}

/// A client and a server with a twin socket, of which the script gets both ends.
fn connect_twin<T: Send + 'static>(
    memory: Arc<Memory>,
    script: impl FnOnce(Peer, Peer) -> T + Send + 'static,
) -> (Client, thread::JoinHandle<T>) {
    let (stream, server) = start(move |mut peer| {
        let (here, there) = UnixStream::pair().unwrap();
        peer.agree(TWIN, &[there.as_fd()]);
        drop(there);
        script(peer, Peer { stream: here })
    });
    let client = Client::handshake(stream, memory, &options(LONG)).unwrap();
    (client, server)
}

/// As [`connect_twin`], or without a twin socket: then the script gets the main one twice.
fn connect_either<T: Send + 'static>(
    with_twin: bool,
    memory: Arc<Memory>,
    script: impl FnOnce(Peer, Peer) -> T + Send + 'static,
) -> (Client, thread::JoinHandle<T>) {
    if with_twin {
        return connect_twin(memory, script);
    }
    connect("", &options(LONG), memory, |peer| {
        let stream = peer.stream.try_clone().unwrap();
        script(peer, Peer { stream })
    })
}

/// Nothing comes for a while, not even the end.
fn expect_silence(peer: &mut Peer) {
    peer.stream.set_read_timeout(Some(SHORT)).unwrap();
    let received = std::io::Read::read(&mut peer.stream, &mut [0]);
    assert_eq!(received.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
    peer.stream.set_read_timeout(None).unwrap();
}

fn expect_away(client: &Client) {
    assert_eq!(client.state(), State::Away);
    assert_eq!(client.serve(), State::Away);
    let read = client.region_read(0, 0, &mut [0; 4]);
    assert!(matches!(read, Err(ConnError::Away)), "{read:?}");
    let posted = client.region_post(0, 0, &[0]);
    assert!(matches!(posted, Err(ConnError::Away)), "{posted:?}");
}

#[test]
fn the_server_sees_one_client_that_goes_on() {
    let (client, server) = connect("\"max_msg_fds\":8", &options(LONG), Memory::new(0), {
        |mut peer| {
            let mut ids = Vec::new();
            while let Some(message) = peer.try_receive() {
                ids.push((message.header.id, message.command()));
                if !message.header.is_posted() {
                    peer.reply(&message, &good_payload(&message));
                }
            }
            ids
        }
    });
    check_alive(&client);
    check_alive(&client);
    client.region_post(0, 0, &[1]).unwrap();
    let next = inherit(&client, &Memory::new(0));
    expect_away(&next);
    // It is still in use meanwhile.
    check_alive(&client);
    hand_over(&client, &next);
    expect_away(&client);
    expect_away(&next);
    drop(client);
    next.go_on().unwrap();
    check_alive(&next);
    // And on, to one that never gets it, and to one that does.
    drop(inherit(&next, &Memory::new(0)));
    let last = inherit(&next, &Memory::new(0));
    hand_over(&next, &last);
    last.go_on().unwrap();
    drop(next);
    check_alive(&last);
    drop(last);
    let seen = server.join().unwrap();
    let commands: Vec<_> = seen.iter().map(|(_, command)| *command).collect();
    assert_eq!(
        commands,
        [
            Command::RegionRead,
            Command::RegionRead,
            Command::RegionWrite,
            Command::RegionRead,
            Command::RegionRead,
            Command::RegionRead
        ]
    );
    let ids: Vec<_> = seen
        .iter()
        .map(|(id, _)| *id)
        .filter(|id| *id > 0)
        .collect();
    assert!(ids.array_windows().all(|[a, b]| a < b), "{ids:?}");
}

#[test]
fn what_the_server_keeps_is_known_to_the_next() {
    let (client, server) = connect(
        "\"max_msg_fds\":8",
        &options(LONG),
        Memory::new(0),
        |mut peer| peer.serve(),
    );
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    let event = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
    let (trigger, unmask) = (event(), event());
    let map = Some((file.as_fd(), 0x3000));
    let access = DmaAccess::ReadWrite;
    client.dma_map(0x10000, 0x2000, map, access).unwrap();
    let access = DmaAccess::ReadOnly;
    client.dma_map(0x40000, 0x1000, None, access).unwrap();
    client.set_irq_events(2, 5, &[trigger.as_fd()]).unwrap();
    client.unmask_irq_by_event(0, unmask.as_fd()).unwrap();
    let next = inherit(&client, &Memory::new(0));
    assert_eq!(next.setup().maps(), 0);
    hand_over(&client, &next);
    next.go_on().unwrap();
    let setup = next.setup();
    assert_eq!((setup.maps(), setup.events()), (2, 1));
    rustix::io::write(setup.event(2, 5).unwrap(), &1_u64.to_ne_bytes()).unwrap();
    rustix::io::write(setup.unmask_event(0, 0).unwrap(), &7_u64.to_ne_bytes()).unwrap();
    for (event, count) in [(&trigger, 1_u64), (&unmask, 7)] {
        let mut read = [0; 8];
        rustix::io::read(event, &mut read).unwrap();
        assert_eq!(u64::from_ne_bytes(read), count);
    }
    drop((client, next));
    server.join().unwrap();
}

#[test]
fn who_gets_it_back_goes_on() {
    let (left, is_left) = mpsc::channel::<()>();
    let (tell, told) = mpsc::channel();
    let (client, server) = connect_twin(Memory::new(0x1000), move |mut peer, mut twin| {
        for _ in 0..2 {
            let command = peer.receive();
            peer.reply(&command, &good_payload(&command));
        }
        is_left.recv().unwrap();
        expect_silence(&mut peer);
        twin.send(&dma(1, Command::DmaRead, 0x1000, 4, &[]));
        expect_silence(&mut twin);
        tell.send(()).unwrap();
        let command = peer.receive();
        peer.reply(&command, &good_payload(&command));
        assert_eq!(twin.receive().header.id, 1);
        peer.serve();
    });
    check_alive(&client);
    let other = inherit(&client, &Memory::new(0));
    check_alive(&client);
    hand_over(&client, &other);
    left.send(()).unwrap();
    told.recv().unwrap();
    drop(other);
    assert!(!is_readable(&client, Duration::ZERO));
    client.go_on().unwrap();
    check_alive(&client);
    assert_eq!(client.state(), State::Ready);
    while client.counters().served == 0 {
        thread::yield_now();
    }
    drop(client);
    server.join().unwrap();
}

#[test]
fn accesses_to_memory_are_answered_by_who_has_the_connection() {
    for with_twin in [true, false] {
        let (tell, told) = mpsc::channel();
        let (go, is_to_go) = mpsc::channel::<()>();
        let script = move |mut peer: Peer, mut commands: Peer| {
            for id in [1, 2] {
                is_to_go.recv().unwrap();
                commands.send(&dma(id, Command::DmaRead, 0x1000, 1, &[]));
                let answer = commands.receive();
                tell.send((answer.header.id, answer.payload[16])).unwrap();
            }
            peer.serve();
        };
        let here = Memory::new(0x1000);
        let (client, server) = connect_either(with_twin, here, script);
        let there = Memory::new(0x1000);
        there.bytes.lock().unwrap()[0] = 0x77;
        let serve = |client: &Client| loop {
            if let Ok(answer) = told.recv_timeout(Duration::from_millis(1)) {
                return answer;
            }
            if is_readable(client, Duration::from_millis(1)) {
                client.serve();
            }
        };
        go.send(()).unwrap();
        assert_eq!(serve(&client), (1, 0));
        let next = inherit(&client, &there);
        hand_over(&client, &next);
        go.send(()).unwrap();
        drop(client);
        next.go_on().unwrap();
        assert_eq!(serve(&next), (2, 0x77));
        if !with_twin {
            // It still gets one command at a time, and so none that is posted.
            next.region_post(0, 0, &[1]).unwrap();
            assert_eq!(next.counters().posts, 0);
        }
        check_alive(&next);
        drop(next);
        server.join().unwrap();
    }
}

#[test]
fn nothing_is_handed_over_while_a_command_waits() {
    let (answer, wait) = mpsc::channel::<()>();
    let (client, server) = connect("", &options(LONG), Memory::new(0), move |mut peer| {
        let command = peer.receive();
        wait.recv().unwrap();
        peer.reply(&command, &good_payload(&command));
        peer.serve();
    });
    let (done, is_done) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| {
            check_alive(&client);
            done.send(()).unwrap();
        });
        while client.counters().calls < 2 {
            thread::yield_now();
        }
        let refused = client.hand_over(SHORT, &mut Descriptors::default());
        assert!(
            matches!(refused, Err(ConnError::Restless(_))),
            "{refused:?}"
        );
        assert_eq!(client.state(), State::Ready);
        assert!(is_done.try_recv().is_err());
        answer.send(()).unwrap();
    });
    client.hand_over(LONG, &mut Descriptors::default()).unwrap();
    let again = client.hand_over(LONG, &mut Descriptors::default());
    assert!(matches!(again, Err(ConnError::Away)));
    client.go_on().unwrap();
    check_alive(&client);
    drop(client);
    server.join().unwrap();
}

#[test]
fn nothing_is_handed_over_in_the_middle_of_a_message() {
    for with_twin in [true, false] {
        let (go, wait) = mpsc::channel::<()>();
        let (half, is_half) = mpsc::channel();
        let script = move |mut peer: Peer, mut commands: Peer| {
            let command = dma(3, Command::DmaWrite, 0x1000, 4, &[1, 2, 3, 4]);
            let (first, rest) = command.split_at(18);
            commands.send(first);
            half.send(()).unwrap();
            wait.recv().unwrap();
            commands.send(rest);
            assert_eq!(commands.receive().header.id, 3);
            peer.serve();
        };
        let memory = Memory::new(0x1000);
        let (client, server) = connect_either(with_twin, memory, script);
        is_half.recv().unwrap();
        // It may have been received, or not yet.
        while is_readable(&client, SHORT) {
            client.serve();
        }
        let refused = client.hand_over(SHORT, &mut Descriptors::default());
        assert!(
            matches!(refused, Err(ConnError::Restless(_))),
            "{refused:?}"
        );
        assert_eq!(client.state(), State::Ready);
        go.send(()).unwrap();
        while client.counters().served == 0 {
            client.serve();
        }
        client.hand_over(LONG, &mut Descriptors::default()).unwrap();
        client.go_on().unwrap();
        check_alive(&client);
        drop(client);
        server.join().unwrap();
    }
}

#[test]
fn a_server_that_ends_meanwhile_is_lost_for_who_goes_on() {
    let (end, is_to_end) = mpsc::channel::<()>();
    let (client, server) = connect_twin(Memory::new(0), move |_peer, _twin| {
        is_to_end.recv().unwrap();
    });
    let next = inherit(&client, &Memory::new(0));
    hand_over(&client, &next);
    end.send(()).unwrap();
    server.join().unwrap();
    // It is the next one's loss alone.
    expect_away(&client);
    next.go_on().unwrap();
    assert!(is_readable(&next, LONG));
    while next.state() == State::Ready {
        next.serve();
    }
    assert_eq!(next.state(), State::Lost(Loss::Closed));
    // Or that of who has it back.
    let _ = client.go_on();
    assert!(is_readable(&client, LONG));
    client.serve();
    assert!(matches!(client.state(), State::Lost(_)));
}

#[test]
fn what_makes_no_sense_is_not_taken_over() {
    let (client, server) = connect_twin(Memory::new(0), |mut peer, _twin| peer.serve());
    let file: OwnedFd = tempfile::tempfile().unwrap().into();
    for iova in [0x1000, 0x4000] {
        let map = Some((file.as_fd(), 0));
        let access = DmaAccess::ReadWrite;
        client.dma_map(iova, 0x1000, map, access).unwrap();
    }
    client
        .set_irq_events(2, 0, &[file.as_fd(), file.as_fd()])
        .unwrap();
    let mut sockets = Descriptors::default();
    let connected = client.describe(&mut sockets).unwrap();
    let file = sockets.add(&Arc::new(file));
    assert!(sockets.find(file).unwrap().as_raw_fd() > 0);
    let inherit = |change: &dyn Fn(&mut Value)| {
        let mut written = json!(connected);
        change(&mut written);
        let connected = serde_json::from_value::<Connected>(written).ok()?;
        Client::inherit(&connected, &sockets, Memory::new(0), &options(LONG)).ok()
    };
    let changes: [&dyn Fn(&mut Value); 9] = [
        &|it| it["socket"] = json!(file),
        &|it| it["twin"] = json!(file),
        &|it| it["socket"] = json!(99),
        &|it| it["twin"] = Value::Null,
        &|it| it["limits"]["twin_socket"] = Value::Null,
        &|it| it["limits"]["page_sizes"] = json!(0),
        &|it| it["limits"]["max_msg_fds"] = json!(1000),
        &|it| it["limits"]["version"]["major"] = json!(7),
        &|it| it["more"] = json!(1),
    ];
    for (number, change) in changes.iter().enumerate() {
        assert!(inherit(change).is_none(), "{number}");
    }

    let next = inherit(&|_| {}).unwrap();
    let mut descriptors = Descriptors::default();
    let standing = client.hand_over(LONG, &mut descriptors).unwrap();
    let take_over = |change: &dyn Fn(&mut Value)| {
        let mut written = json!(standing);
        change(&mut written);
        let standing = serde_json::from_value::<Standing>(written).ok()?;
        next.take_over(&standing, &descriptors).ok()
    };
    let changes: [&dyn Fn(&mut Value); 8] = [
        &|it| it["maps"][0]["size"] = json!(0),
        &|it| it["maps"][0]["size"] = json!(0x3001),
        &|it| it["maps"][1]["size"] = json!(u64::MAX),
        &|it| it["maps"][1]["iova"] = json!(0),
        &|it| it["maps"][0]["file"][0] = json!(50),
        &|it| it["events"][0]["event"] = json!(u32::MAX),
        &|it| it["events"][1]["irq"] = json!(0),
        &|it| it["left_at"]["last_id"] = json!(-1),
    ];
    for (number, change) in changes.iter().enumerate() {
        assert!(take_over(change).is_none(), "{number}");
    }
    take_over(&|_| {}).unwrap();
    drop(client);
    next.go_on().unwrap();
    check_alive(&next);
    drop(next);
    server.join().unwrap();
}
