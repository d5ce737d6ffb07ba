//! Requests to the control API that Outrigger and Cloud Hypervisor both have.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde_json::Value;

/// Has something done, however long it takes.
///
/// # Errors
/// When it is refused or fails, or there is no answer.
pub(crate) fn put(socket: &Path, endpoint: &str, body: &str) -> anyhow::Result<()> {
    ask(socket, "PUT", endpoint, body).map(drop)
}

/// Asks for something.
///
/// # Errors
/// As of [`put`].
pub(crate) fn get(socket: &Path, endpoint: &str) -> anyhow::Result<Value> {
    Ok(serde_json::from_str(&ask(socket, "GET", endpoint, "")?)?)
}

/// Cloud Hypervisor neither does anything for a client that has nothing more to say, nor hangs up, so the answer ends
/// where it says.
fn ask(socket: &Path, method: &str, endpoint: &str, body: &str) -> anyhow::Result<String> {
    const PATIENCE: Duration = Duration::from_secs(20);
    let mut stream = UnixStream::connect(socket).context("connecting to the API")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let length = body.len();
    let head = format!("{method} /api/v1/{endpoint} HTTP/1.1\r\nHost: localhost\r\n");
    // Without a body, there is no length either.
    let request = match body {
        "" => format!("{head}\r\n"),
        body => format!("{head}Content-Length: {length}\r\n\r\n{body}"),
    };
    stream.write_all(request.as_bytes())?;
    let (status, body) = answer(&mut BufReader::new(stream))
        .with_context(|| format!("{endpoint} is not answered"))?;
    ensure!(status < 300, "{endpoint} is answered with {status}: {body}");
    Ok(body)
}

/// The status and the body of an answer.
fn answer(stream: &mut impl BufRead) -> anyhow::Result<(u16, String)> {
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split_ascii_whitespace().nth(1);
    let status = status.context("an answer without a status")?.parse()?;
    let mut length = 0;
    while line.trim() != "" {
        line.clear();
        stream.read_line(&mut line)?;
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse()?;
        }
    }
    let mut body = String::new();
    stream.take(length).read_to_string(&mut body)?;
    Ok((status, body))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_ends_where_it_says() {
        let mut bytes = &b"HTTP/1.1 500 \r\nServer: x\r\nContent-length: 3\r\n\r\n[1]more"[..];
        assert_eq!(answer(&mut bytes).unwrap(), (500, "[1]".to_owned()));
    }

    #[test]
    fn answer_may_have_no_body() {
        let mut bytes = &b"HTTP/1.1 204 No Content\r\n\r\n"[..];
        assert_eq!(answer(&mut bytes).unwrap(), (204, String::new()));
    }

    #[test]
    fn end_is_no_answer() {
        assert!(answer(&mut &b""[..]).is_err());
    }
}
