//! The cluster token: `authorization: Bearer <token>` on every call, added by clients and checked by servers.

use subtle::ConstantTimeEq;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::Interceptor;
use tonic::{Request, Status};

/// The token is not fit for a header.
#[derive(Debug, thiserror::Error)]
pub enum BadToken {
    /// A server without a token would let everybody in.
    #[error("the cluster token is empty")]
    Empty,
    /// Headers are visible ASCII.
    #[error("the cluster token has characters other than visible ASCII")]
    NotAscii,
}

fn header(token: &str) -> Result<MetadataValue<Ascii>, BadToken> {
    if token.is_empty() {
        return Err(BadToken::Empty);
    }
    let mut value =
        MetadataValue::try_from(format!("Bearer {token}")).map_err(|_| BadToken::NotAscii)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Refuses calls that do not carry the cluster token. Wrap a service: `FooServer::with_interceptor(foo, check)`.
#[derive(Clone)]
pub struct TokenCheck {
    expected: MetadataValue<Ascii>,
}

impl TokenCheck {
    /// Checks for `token`.
    pub fn new(token: &str) -> Result<Self, BadToken> {
        Ok(Self {
            expected: header(token)?,
        })
    }
}

impl Interceptor for TokenCheck {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        let given = request.metadata().get("authorization");
        // Constant time over equal lengths: how much of a guess is right must not show in the delay.
        let same =
            given.is_some_and(|given| bool::from(given.as_bytes().ct_eq(self.expected.as_bytes())));
        if same {
            Ok(request)
        } else if given.is_some() {
            Err(Status::unauthenticated("the cluster token is wrong"))
        } else {
            Err(Status::unauthenticated(
                "the call carries no cluster token (authorization: Bearer ...)",
            ))
        }
    }
}

/// Adds the cluster token to calls.
#[derive(Clone)]
pub struct TokenBearer {
    value: MetadataValue<Ascii>,
}

impl TokenBearer {
    /// Adds `token`.
    pub fn new(token: &str) -> Result<Self, BadToken> {
        Ok(Self {
            value: header(token)?,
        })
    }
}

impl Interceptor for TokenBearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request
            .metadata_mut()
            .insert("authorization", self.value.clone());
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_token_passes() {
        let mut check = TokenCheck::new("secret").unwrap();
        let request = |token: &str| {
            TokenBearer::new(token)
                .unwrap()
                .call(Request::new(()))
                .unwrap()
        };
        assert!(check.call(request("secret")).is_ok());
        assert!(check.call(request("secreT")).is_err());
        assert!(check.call(request("secret2")).is_err());
        assert!(check.call(Request::new(())).is_err());
        assert!(TokenCheck::new("").is_err());
        assert!(TokenCheck::new("a\nb").is_err());
    }
}
