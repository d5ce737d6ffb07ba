//! The endpoints. Their description in OpenAPI is made of them by a test, so that the program does without.

use axum::Router;
use axum::extract::{FromRequestParts, State};
use axum::http::request::Parts;
use axum::http::{HeaderName, StatusCode, Uri, header};
use axum::middleware::map_response;
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, put};
use hyper::ext::ReasonPhrase;

use super::ROOT;
use super::body::{
    ReceiveMigrationData, ResolveMigrationData, RestoreConfig, SendMigrationData, SnapshotConfig,
    VmConfig, VmCounters, VmInfo, VmmPing,
};
use super::reply::{AnyBody, Json, NoBody, Refusal};
use crate::control::{Control, ControlError, MigrationProgress, Operation};

/// Makes the service of its endpoints, and for the test of their description a list of them.
macro_rules! endpoints {
    ($($method:ident $path:literal $handler:ident,)*) => {
        /// The service.
        pub(super) fn router(control: Control) -> Router {
            let router = Router::new()
                $(.route($path, $method($handler)))*
                .with_state(control);
            Router::new()
                .nest(ROOT, router)
                .fallback(unknown)
                .method_not_allowed_fallback(wrong_method)
                .layer(map_response(without_reason))
        }

        #[cfg(test)]
        const ENDPOINTS: &[(&str, &str)] = &[$((stringify!($method), $path),)*];

        #[cfg(test)]
        #[derive(utoipa::OpenApi)]
        #[openapi(
            info(
                title = "Outrigger's control API",
                description = "Cloud Hypervisor's API as far as it goes, over a Unix socket, and vm.migration. Errors \
                               are lists of messages, from the top to the root cause.",
                license(name = "Apache-2.0 OR BSD-3-Clause")
            ),
            servers((url = "http://localhost/api/v1")),
            paths($($handler),*)
        )]
        struct Description;
    };
}

endpoints! {
    get "/vmm.ping" vmm_ping,
    put "/vmm.shutdown" vmm_shutdown,
    get "/vm.info" vm_info,
    get "/vm.counters" vm_counters,
    put "/vm.create" vm_create,
    put "/vm.boot" vm_boot,
    put "/vm.pause" vm_pause,
    put "/vm.resume" vm_resume,
    put "/vm.reboot" vm_reboot,
    put "/vm.shutdown" vm_shutdown,
    put "/vm.delete" vm_delete,
    put "/vm.power-button" vm_power_button,
    put "/vm.snapshot" vm_snapshot,
    put "/vm.restore" vm_restore,
    put "/vm.send-migration" vm_send_migration,
    put "/vm.receive-migration" vm_receive_migration,
    put "/vm.resolve-migration" vm_resolve_migration,
    get "/vm.migration" vm_migration,
    delete "/vm.migration" vm_cancel_migration,
}

/// Cloud Hypervisor's client takes all of a status line that is behind the version for a number.
async fn without_reason(mut response: Response) -> Response {
    let none = ReasonPhrase::from_static(b"");
    response.extensions_mut().insert(none);
    response
}

async fn unknown(uri: Uri, _: AnyBody) -> Refusal {
    let what = format!("there is no endpoint {}", uri.path());
    Refusal::new(StatusCode::NOT_FOUND, what)
}

async fn wrong_method(uri: Uri, _: AnyBody) -> Refusal {
    let what = format!("{} is there, but not by this method", uri.path());
    Refusal::new(StatusCode::METHOD_NOT_ALLOWED, what)
}

/// What there is to say of an action that has been done: nothing.
type Done = Result<StatusCode, Refusal>;

fn done(result: Result<(), ControlError>) -> Done {
    Ok(result.map(|()| StatusCode::NO_CONTENT)?)
}

/// Says that the VMM is there.
#[cfg_attr(test, utoipa::path(get, path = "/vmm.ping", responses((status = 200, body = VmmPing))))]
async fn vmm_ping() -> Json<VmmPing> {
    Json(VmmPing::here())
}

/// Ends the VMM, and with it the VM.
#[cfg_attr(test, utoipa::path(put, path = "/vmm.shutdown", responses((status = 204, description = "It is about to end; the VM has."))))]
async fn vmm_shutdown(State(control): State<Control>, _: NoBody) -> Done {
    done(control.quit().outcome().await)
}

/// Tells what the VM is and does.
#[cfg_attr(test, utoipa::path(get, path = "/vm.info", responses(
    (status = 200, body = VmInfo),
    (status = 404, description = "There is no VM.", body = Vec<String>),
)))]
async fn vm_info(State(control): State<Control>) -> Result<Json<VmInfo>, Refusal> {
    Ok(Json(control.info()?.into()))
}

/// Tells what has been counted of each device (`latency_*` is how long its answered calls took), of memory, and of the
/// migration.
#[cfg_attr(test, utoipa::path(get, path = "/vm.counters", responses(
    (status = 200, body = VmCounters),
    (status = 404, description = "There is no VM.", body = Vec<String>),
    (status = 405, description = "It does not run.", body = Vec<String>),
)))]
async fn vm_counters(State(control): State<Control>) -> Result<Json<VmCounters>, Refusal> {
    Ok(Json(VmCounters(control.counters()?)))
}

/// Says what the VM is to be. It is made when it is booted.
#[cfg_attr(test, utoipa::path(put, path = "/vm.create", request_body = VmConfig, responses(
    (status = 204, description = "It can be booted."),
    (status = 400, description = "It cannot be; which fields say so is told.", body = Vec<String>),
    (status = 409, description = "There is a VM already.", body = Vec<String>),
)))]
async fn vm_create(State(control): State<Control>, Json(config): Json<VmConfig>) -> Done {
    done(control.create(config.try_into()?))
}

/// Makes the VM that was created, and starts it.
#[cfg_attr(test, utoipa::path(put, path = "/vm.boot", responses(
    (status = 204, description = "It runs."),
    (status = 404, description = "There is no VM.", body = Vec<String>),
    (status = 405, description = "It runs already.", body = Vec<String>),
    (status = 500, description = "It cannot be made.", body = Vec<String>),
)))]
async fn vm_boot(State(control): State<Control>, _: NoBody) -> Done {
    done(control.boot().outcome().await)
}

/// Has the vCPUs stop. They have when vm.info says `Paused`; that may take as long as a device takes to answer.
#[cfg_attr(test, utoipa::path(put, path = "/vm.pause", responses(
    (status = 204, description = "They are about to stop."),
    (status = 404, description = "There is no VM.", body = Vec<String>),
    (status = 405, description = "It does not run, or is paused already.", body = Vec<String>),
)))]
async fn vm_pause(State(control): State<Control>, _: NoBody) -> Done {
    done(control.pause())
}

/// Lets the vCPUs go on.
#[cfg_attr(test, utoipa::path(put, path = "/vm.resume", responses(
    (status = 204, description = "They go on."),
    (status = 404, description = "There is no VM.", body = Vec<String>),
    (status = 405, description = "It is not paused.", body = Vec<String>),
)))]
async fn vm_resume(State(control): State<Control>, _: NoBody) -> Done {
    done(control.resume())
}

/// Resets the VM and its devices, and starts it again.
#[cfg_attr(test, utoipa::path(put, path = "/vm.reboot", responses(
    (status = 204, description = "It has been started again."),
    (status = 404, description = "There is no VM.", body = Vec<String>),
    (status = 405, description = "It does not run.", body = Vec<String>),
)))]
async fn vm_reboot(State(control): State<Control>, _: NoBody) -> Done {
    done(control.reboot().outcome().await)
}

/// Ends the VM's run. It can be booted again.
#[cfg_attr(test, utoipa::path(put, path = "/vm.shutdown", responses(
    (status = 204, description = "It does not run any more."),
    (status = 404, description = "There is no VM.", body = Vec<String>),
    (status = 405, description = "It does not run.", body = Vec<String>),
)))]
async fn vm_shutdown(State(control): State<Control>, _: NoBody) -> Done {
    done(control.shut_down().outcome().await)
}

/// Ends the VM's run, if it runs, and forgets it.
#[cfg_attr(test, utoipa::path(put, path = "/vm.delete", responses(
    (status = 204, description = "There is no VM any more."),
    (status = 404, description = "There was none.", body = Vec<String>),
)))]
async fn vm_delete(State(control): State<Control>, _: NoBody) -> Done {
    done(control.delete().outcome().await)
}

/// Presses the VM's power button.
#[cfg_attr(test, utoipa::path(put, path = "/vm.power-button", responses(
    (status = 204, description = "It is pressed; what follows is the guest's affair."),
    (status = 404, description = "There is no VM.", body = Vec<String>),
    (status = 405, description = "It does not run.", body = Vec<String>),
)))]
async fn vm_power_button(State(control): State<Control>, _: NoBody) -> Done {
    done(control.press_power_button())
}

/// Writes the VM's state into a directory.
#[cfg_attr(test, utoipa::path(put, path = "/vm.snapshot", request_body = SnapshotConfig,
    params(("prefer" = Option<String>, Header, description = "`respond-async` has it answered at once.")),
    responses(
        (status = 204, description = "It is there."),
        (status = 202, description = "It has begun; vm.migration tells the rest."),
        (status = 404, description = "There is no VM.", body = Vec<String>),
        (status = 405, description = "It is not paused.", body = Vec<String>),
        (status = 429, description = "Another operation goes on.", body = Vec<String>),
        (status = 500, description = "It has failed; the VM is as it was.", body = Vec<String>),
    )))]
async fn vm_snapshot(
    State(control): State<Control>,
    prefer: Prefer,
    Json(config): Json<SnapshotConfig>,
) -> Result<Response, Refusal> {
    start(&control, prefer, config.try_into()?).await
}

/// Makes a VM of a snapshot.
#[cfg_attr(test, utoipa::path(put, path = "/vm.restore", request_body = RestoreConfig,
    params(("prefer" = Option<String>, Header, description = "`respond-async` has it answered at once.")),
    responses(
        (status = 204, description = "The VM is there."),
        (status = 202, description = "It has begun; vm.migration tells the rest."),
        (status = 409, description = "There is a VM already.", body = Vec<String>),
        (status = 429, description = "Another operation goes on.", body = Vec<String>),
        (status = 500, description = "It has failed; there is no VM.", body = Vec<String>),
    )))]
async fn vm_restore(
    State(control): State<Control>,
    prefer: Prefer,
    Json(config): Json<RestoreConfig>,
) -> Result<Response, Refusal> {
    start(&control, prefer, config.try_into()?).await
}

/// Moves the VM to another VMM while it runs.
#[cfg_attr(test, utoipa::path(put, path = "/vm.send-migration", request_body = SendMigrationData,
    params(("prefer" = Option<String>, Header, description = "`respond-async` has it answered at once.")),
    responses(
        (status = 204, description = "The VM runs there, and no more here."),
        (status = 202, description = "It has begun; vm.migration tells the rest."),
        (status = 404, description = "There is no VM.", body = Vec<String>),
        (status = 405, description = "It does not run.", body = Vec<String>),
        (status = 429, description = "Another operation goes on.", body = Vec<String>),
        (status = 500, description = "It has failed; vm.migration tells where the VM is.", body = Vec<String>),
    )))]
async fn vm_send_migration(
    State(control): State<Control>,
    prefer: Prefer,
    Json(data): Json<SendMigrationData>,
) -> Result<Response, Refusal> {
    start(&control, prefer, data.try_into()?).await
}

/// Waits for another VMM to send its VM, and takes it.
#[cfg_attr(test, utoipa::path(put, path = "/vm.receive-migration", request_body = ReceiveMigrationData,
    params(("prefer" = Option<String>, Header, description = "`respond-async` has it answered at once.")),
    responses(
        (status = 204, description = "The VM runs here."),
        (status = 202, description = "It is waited for; vm.migration tells the rest."),
        (status = 409, description = "There is a VM already.", body = Vec<String>),
        (status = 429, description = "Another operation goes on.", body = Vec<String>),
        (status = 500, description = "It has failed; there is no VM.", body = Vec<String>),
    )))]
async fn vm_receive_migration(
    State(control): State<Control>,
    prefer: Prefer,
    Json(data): Json<ReceiveMigrationData>,
) -> Result<Response, Refusal> {
    start(&control, prefer, data.try_into()?).await
}

/// Says what is to become of a VM whose migration is in doubt: it stands still, and may run at the other end.
#[cfg_attr(test, utoipa::path(put, path = "/vm.resolve-migration", request_body = ResolveMigrationData, responses(
    (status = 204, description = "It is known where the VM runs; vm.migration tells."),
    (status = 404, description = "No migration is in doubt.", body = Vec<String>),
    (status = 500, description = "The other end does not say.", body = Vec<String>),
)))]
async fn vm_resolve_migration(
    State(control): State<Control>,
    Json(data): Json<ResolveMigrationData>,
) -> Done {
    done(control.resolve(data.into())?.outcome().await)
}

/// Tells how far the operation has come that goes on (vm.snapshot, vm.restore, vm.send-migration or
/// vm.receive-migration), or how the last one ended.
#[cfg_attr(test, utoipa::path(get, path = "/vm.migration", responses(
    (status = 200, body = MigrationProgress),
    (status = 404, description = "There has been none.", body = Vec<String>),
)))]
async fn vm_migration(State(control): State<Control>) -> Result<Json<MigrationProgress>, Refusal> {
    Ok(Json(control.migration()?))
}

/// Cancels the operation that goes on.
#[cfg_attr(test, utoipa::path(delete, path = "/vm.migration", responses(
    (status = 204, description = "It ends soon, unless it has come too far; vm.migration tells."),
    (status = 404, description = "None goes on.", body = Vec<String>),
)))]
async fn vm_cancel_migration(State(control): State<Control>, _: NoBody) -> Done {
    done(control.cancel())
}

/// Starts an operation, and answers when it has ended, or at once.
async fn start(
    control: &Control,
    prefer: Prefer,
    operation: Operation,
) -> Result<Response, Refusal> {
    let pending = control.start(operation)?;
    if prefer == Prefer::Async {
        let headers = [
            (header::LOCATION, format!("{ROOT}/vm.migration")),
            (PREFERENCE_APPLIED, RESPOND_ASYNC.to_owned()),
        ];
        return Ok((StatusCode::ACCEPTED, headers).into_response());
    }
    done(pending.outcome().await).map(IntoResponse::into_response)
}

/// How a client likes to be answered (RFC 7240).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Prefer {
    /// At the end.
    Usual,
    /// At once.
    Async,
}

const PREFER: HeaderName = HeaderName::from_static("prefer");
const PREFERENCE_APPLIED: HeaderName = HeaderName::from_static("preference-applied");
const RESPOND_ASYNC: &str = "respond-async";

impl<S: Sync> FromRequestParts<S> for Prefer {
    type Rejection = std::convert::Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Self::Rejection> {
        let values = parts.headers.get_all(PREFER).iter();
        let mut preferences = values
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','));
        let is_async = |preference: &str| preference.trim().eq_ignore_ascii_case(RESPOND_ASYNC);
        Ok(if preferences.any(is_async) {
            Self::Async
        } else {
            Self::Usual
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::Path;

    use utoipa::OpenApi as _;

    use super::*;

    #[test]
    fn description_is_the_one_that_is_checked_in() {
        let made = Description::openapi().to_pretty_json().unwrap() + "\n";
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/openapi.json");
        if std::env::var_os("UPDATE_OPENAPI").is_some() {
            std::fs::write(&path, &made).unwrap();
        }
        let checked_in = std::fs::read_to_string(&path).unwrap_or_default();
        assert!(
            checked_in == made,
            "resources/openapi.json is out of date: UPDATE_OPENAPI=1 cargo test -p vmm description"
        );
    }

    #[test]
    fn endpoints_are_where_their_description_says() {
        let text = Description::openapi().to_json().unwrap();
        let description: serde_json::Value = serde_json::from_str(&text).unwrap();
        let paths = description["paths"].as_object().unwrap();
        let described = paths.iter().flat_map(|(path, methods)| {
            let methods = methods.as_object().unwrap().keys();
            methods.map(move |method| (method.as_str(), path.as_str()))
        });
        let described: BTreeSet<_> = described.collect();
        assert_eq!(described, ENDPOINTS.iter().copied().collect());
    }
}
