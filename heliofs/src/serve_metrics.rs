//! `/metrics` and `/ready` over HTTP.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::failure::{Outcome, While};

/// What a service shows of itself.
pub(crate) struct Exposed {
    /// Prometheus' text format.
    pub(crate) metrics: Box<dyn Fn() -> String + Send + Sync>,
    /// Why it can't serve, if it can't.
    pub(crate) unready: Box<dyn Fn() -> Option<String> + Send + Sync>,
}

/// Everything in a registry, in Prometheus' text format.
pub(crate) fn encode(registry: &prometheus::Registry) -> String {
    prometheus::TextEncoder::new()
        .encode_to_string(&registry.gather())
        .unwrap_or_else(|error| format!("# {error}\n"))
}

/// Serves until `stop`; the address listened on (port 0 picks one).
pub(crate) async fn start(
    listen: SocketAddr,
    exposed: Exposed,
    stop: CancellationToken,
) -> Outcome<SocketAddr> {
    let listener = TcpListener::bind(listen)
        .await
        .while_(format_args!("listen for metrics at {listen}"))?;
    let address = listener
        .local_addr()
        .while_("look at the metrics' address")?;
    let exposed = Arc::new(exposed);
    let for_metrics = Arc::clone(&exposed);
    let router = Router::new()
        .route(
            "/metrics",
            get(move || async move { (for_metrics.metrics)() }),
        )
        .route(
            "/ready",
            get(move || async move {
                match (exposed.unready)() {
                    None => (StatusCode::OK, "ready\n".to_owned()),
                    Some(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
                }
            }),
        );
    tokio::spawn(async move {
        let server = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
        if let Err(error) = server.await {
            tracing::warn!(%error, "metrics are no longer served");
        }
    });
    Ok(address)
}
