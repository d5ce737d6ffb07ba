//! The thread that serves the API, and its connections.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{UnixListener, UnixStream};
use tokio::runtime;
use tokio::sync::{Semaphore, watch};
use tokio::time::{sleep, timeout};

use super::endpoints;
use super::reply::SLOWEST;
use crate::control::Control;
use crate::private_socket::PrivateSocket;

/// How many clients are served at once. Others wait until one of these has gone.
const CONNECTIONS: usize = 64;

/// The most that is kept of a request besides its body.
const MAX_HEAD: usize = 16 << 10;

/// How long clients have to take their last responses when the VMM ends.
const LAST_RESPONSES: Duration = Duration::from_secs(1);

/// Why the API is not served.
#[derive(Debug, thiserror::Error)]
#[error("--api-socket: cannot serve it")]
pub struct ApiError(#[source] io::Error);

/// The API, which is served until this is dropped.
#[derive(Debug)]
pub struct Api {
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    _socket: PrivateSocket,
}

impl Api {
    /// Serves the VMM that `control` is the handle of.
    pub fn serve(socket: PrivateSocket, control: Control) -> Result<Self, ApiError> {
        let listener = socket.listener().try_clone().map_err(ApiError)?;
        listener.set_nonblocking(true).map_err(ApiError)?;
        let runtime = runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(ApiError)?;
        let (stop, stopped) = watch::channel(false);
        let thread = thread::Builder::new()
            .name("api".into())
            .spawn(move || {
                if let Err(error) = runtime.block_on(serve(listener, control, stopped)) {
                    log::error!("--api-socket: it is served no longer: {error}");
                }
            })
            .map_err(ApiError)?;
        Ok(Self {
            stop,
            thread: Some(thread),
            _socket: socket,
        })
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.stop.send(true);
        if self
            .thread
            .take()
            .is_some_and(|thread| thread.join().is_err())
        {
            log::error!("the thread of the API has panicked");
        }
    }
}

async fn serve(
    listener: std::os::unix::net::UnixListener,
    control: Control,
    mut stopped: watch::Receiver<bool>,
) -> io::Result<()> {
    let listener = UnixListener::from_std(listener)?;
    let router = endpoints::router(control);
    let free = Arc::new(Semaphore::new(CONNECTIONS));
    let all = CONNECTIONS.try_into().unwrap_or(u32::MAX);
    let stop = stopped.clone();
    let accept = async {
        loop {
            // Taken before the client is, so that others wait in the socket's own queue.
            let Ok(place) = free.clone().acquire_owned().await else {
                return;
            };
            match listener.accept().await {
                Ok((stream, _)) => {
                    let connection = talk(stream, router.clone(), stop.clone());
                    tokio::spawn(async move {
                        connection.await;
                        drop(place);
                    });
                }
                Err(error) => {
                    // Too many open files, most likely. It gets better when a client goes.
                    log::warn!("--api-socket: a client cannot be served: {error}");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    };
    tokio::select! {
        () = accept => {}
        () = stop_of(&mut stopped) => {}
    }
    // All places are free when all clients have gone.
    let _ = timeout(LAST_RESPONSES, free.acquire_many(all)).await;
    Ok(())
}

/// Waits until the API is to be served no longer.
async fn stop_of(stopped: &mut watch::Receiver<bool>) {
    // Nobody to say so is as good as somebody who does.
    let _ = stopped.wait_for(|stopped| *stopped).await;
}

/// Serves one client until it goes, is too slow, or the VMM ends.
async fn talk(stream: UnixStream, router: Router, mut stopped: watch::Receiver<bool>) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(SLOWEST)
        .max_buf_size(MAX_HEAD)
        // Clients may say early that they have nothing more to ask.
        .half_close(true)
        // Cloud Hypervisor's client looks for headers in this spelling only.
        .title_case_headers(true)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = stop_of(&mut stopped) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        log::debug!("--api-socket: a client is cut off: {error}");
    }
}
