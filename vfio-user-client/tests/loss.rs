//! How connections end, and who learns of it.

#![expect(clippy::unwrap_used, reason = "a test panics when it fails")]

mod support;

use std::io::Read;
use std::os::unix::net::UnixListener;
use std::thread;
use std::time::{Duration, Instant};

use rustix::net::sockopt::set_socket_send_buffer_size;
use support::{LONG, Memory, check_alive, connect, is_readable, kind, options, start};
use vfio_user_client::{Client, ConnError, Loss, State};
use vfio_user_protocol::{Header, take};
use zerocopy::IntoBytes;

const SHORT: Duration = Duration::from_millis(80);

#[test]
fn all_callers_are_woken_at_once_when_the_server_dies() {
    let (client, server) = connect("", &options(LONG), Memory::new(0), |mut peer| {
        for _ in 0..16 {
            peer.receive();
        }
    });
    let began = Instant::now();
    thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                let result = client.region_read(0, 0, &mut [0; 4]);
                assert!(
                    matches!(result, Err(ConnError::Lost(Loss::Closed))),
                    "{result:?}"
                );
            });
        }
    });
    assert!(began.elapsed() < LONG / 2);
    server.join().unwrap();
    let result = client.region_post(0, 0, &[1]);
    assert!(matches!(result, Err(ConnError::Lost(Loss::Closed))));
}

#[test]
fn the_event_loop_learns_of_the_end_once() {
    let (client, server) = connect("", &options(LONG), Memory::new(0), drop);
    server.join().unwrap();
    assert!(is_readable(&client, LONG));
    assert_eq!(client.serve(), State::Lost(Loss::Closed));
    while is_readable(&client, Duration::ZERO) {
        assert_eq!(client.serve(), State::Lost(Loss::Closed));
    }
    assert!(!is_readable(&client, SHORT));
    assert_eq!(client.state(), State::Lost(Loss::Closed));
}

#[test]
fn the_event_loop_learns_of_an_end_that_a_caller_noticed() {
    let (client, server) = connect("", &options(LONG), Memory::new(0), |mut peer| {
        peer.receive();
        peer.send(&[0xff; 16]);
        assert!(peer.try_receive().is_none(), "the client still talks");
    });
    assert!(!is_readable(&client, Duration::ZERO));
    assert!(matches!(
        client.reset(),
        Err(ConnError::Lost(Loss::Garbage))
    ));
    assert!(is_readable(&client, LONG));
    assert_eq!(client.serve(), State::Lost(Loss::Garbage));
    server.join().unwrap();
}

#[test]
fn a_reply_that_came_before_the_end_still_counts() {
    let (client, server) = connect("", &options(LONG), Memory::new(0), |mut peer| {
        let command = peer.receive();
        peer.reply(&command, &[]);
    });
    client.reset().unwrap();
    server.join().unwrap();
    assert!(matches!(client.reset(), Err(ConnError::Lost(Loss::Closed))));
}

#[test]
fn a_server_that_does_not_read_lets_posts_time_out_and_may_go_on_later() {
    let (go, gone) = std::sync::mpsc::channel();
    let (client, server) = connect("", &options(SHORT), Memory::new(0), move |mut peer| {
        gone.recv().unwrap();
        peer.serve();
    });
    let error = loop {
        if let Err(error) = client.region_post(0, 0, &[1; 4]) {
            break error;
        }
    };
    assert!(matches!(error, ConnError::TimedOut { .. }), "{error:?}");
    let began = Instant::now();
    assert_eq!(kind(&client.region_read(0, 0, &mut [0; 4])), "timed out");
    assert!(began.elapsed() >= SHORT);
    go.send(()).unwrap();
    while client.region_read(0, 0, &mut [0; 4]).is_err() {}
    check_alive(&client);
    drop(client);
    server.join().unwrap();
}

#[test]
fn a_deadline_in_the_middle_of_a_message_ends_the_connection() {
    let (stream, server) = start(|mut peer| {
        peer.agree("", &[]);
        thread::sleep(4 * SHORT);
        while peer.try_receive().is_some() {}
    });
    // Room for less than one message, so that one can be half sent.
    set_socket_send_buffer_size(&stream, 1).unwrap();
    let client = Client::handshake(stream, Memory::new(0), &options(SHORT)).unwrap();
    let mut result = Ok(());
    while result.is_ok() {
        result = client.region_post(0, 0, &[0; 28 << 10]);
    }
    assert_eq!(kind(&result), "timed out");
    assert_eq!(client.state(), State::Lost(Loss::HalfSent));
    server.join().unwrap();
}

#[test]
fn an_answer_to_a_command_that_is_half_sent_changes_nothing() {
    let (stream, server) = start(|mut peer| {
        peer.agree("", &[]);
        let mut header = [0; Header::SIZE];
        peer.stream.read_exact(&mut header).unwrap();
        let (header, _) = take::<Header>(&header).unwrap();
        peer.send(header.reply(0).as_bytes());
        thread::sleep(4 * SHORT);
        while peer.try_receive().is_some() {}
    });
    set_socket_send_buffer_size(&stream, 1).unwrap();
    let client = Client::handshake(stream, Memory::new(0), &options(SHORT)).unwrap();
    let result = client.region_write(0, 0, &[0; 28 << 10]);
    assert_eq!(kind(&result), "timed out");
    assert_eq!(client.state(), State::Lost(Loss::HalfSent));
    // It was the command's answer, but nobody wanted it any more.
    assert_eq!(client.counters().strays, 0);
    server.join().unwrap();
}

#[test]
fn nobody_listens() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let error = Client::connect(&path, Memory::new(0), &options(LONG)).unwrap_err();
    assert!(matches!(error, ConnError::Connect { .. }));
    assert!(error.to_string().contains("socket"));
}

#[test]
fn a_server_with_no_room_for_one_more_client_lets_it_time_out() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let _listener = UnixListener::bind(&path).unwrap();
    let began = Instant::now();
    // It is connected by the kernel, and never greeted.
    let error = Client::connect(&path, Memory::new(0), &options(SHORT)).unwrap_err();
    assert!(matches!(error, ConnError::TimedOut { .. }), "{error:?}");
    assert!(began.elapsed() >= SHORT);
}
