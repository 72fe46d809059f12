//! What an error of `object_store` means for us.

use object_store::Error;

use crate::StoreError;

/// What to do about a failed attempt.
#[derive(Debug)]
pub(crate) enum Fault {
    /// Fails for good, or `Retry`.
    Error(StoreError),
    /// The range begins behind the object's end.
    OutOfRange,
    /// The server does not know conditional puts.
    NoConditions,
}

/// Classifies `error` of `operation` on `key`.
pub(crate) fn classify(operation: &'static str, key: &str, error: Error) -> Fault {
    let text = chain(&error);
    let key = key.to_owned();
    Fault::Error(match error {
        Error::NotFound { .. } if text.contains("NoSuchBucket") => StoreError::Denied {
            operation,
            key,
            detail: format!("the bucket does not exist; create it with `heliofs format`: {text}"),
        },
        Error::NotFound { .. } => StoreError::NotFound { key },
        Error::AlreadyExists { .. } | Error::Precondition { .. } => {
            StoreError::AlreadyExists { key, detail: text }
        }
        Error::PermissionDenied { .. } | Error::Unauthenticated { .. } => StoreError::Denied {
            operation,
            key,
            detail: format!("check access key, secret key and the bucket's policy: {text}"),
        },
        Error::NotImplemented { .. } if operation == "put" => return Fault::NoConditions,
        Error::NotImplemented { .. }
        | Error::NotSupported { .. }
        | Error::InvalidPath { .. }
        | Error::UnknownConfigurationKey { .. }
        | Error::NotModified { .. } => StoreError::Invalid(text),
        error => match status(&text) {
            Some(416) => return Fault::OutOfRange,
            Some(501) if operation == "put" => return Fault::NoConditions,
            // The request itself is wrong, and will be the next time; except for those that mean "later".
            Some(status @ 400..=499) if !matches!(status, 408 | 409 | 425 | 429) => {
                StoreError::Denied {
                    operation,
                    key,
                    detail: format!("check bucket URL, region and keys: {text}"),
                }
            }
            // How object_store's file and memory backends say 416.
            None if text.contains("Wanted range starting at")
                || text.contains("greater than object length")
                || text.contains("Requested range was invalid") =>
            {
                return Fault::OutOfRange;
            }
            None if text.contains("redirect without LOCATION") => StoreError::Denied {
                operation,
                key,
                detail: format!("the bucket is in another region; set --region: {text}"),
            },
            None if io_denied(&error) => StoreError::Denied {
                operation,
                key,
                detail: format!("check the directory's owner and mode: {text}"),
            },
            _ => StoreError::Retry {
                operation,
                key,
                detail: text,
            },
        },
    })
}

/// `error` of an operation that neither reads a range nor puts under a condition.
pub(crate) fn as_error(operation: &'static str, key: &str, error: Error) -> StoreError {
    match classify(operation, key, error) {
        Fault::Error(error) => error,
        Fault::OutOfRange => StoreError::Invalid(format!("{operation} `{key}`: range is invalid")),
        Fault::NoConditions => StoreError::Invalid(format!(
            "{operation} `{key}`: the store does not implement it"
        )),
    }
}

/// The error with its causes, each once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        source = cause.source();
    }
    text
}

/// The HTTP status in the text of an error; `object_store` keeps the number itself private.
fn status(text: &str) -> Option<u16> {
    let (_, after) = text.split_once("status code: ")?;
    after.get(..3)?.parse().ok()
}

fn io_denied(error: &Error) -> bool {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(io) = cause.downcast_ref::<std::io::Error>() {
            return matches!(
                io.kind(),
                std::io::ErrorKind::PermissionDenied | std::io::ErrorKind::ReadOnlyFilesystem
            );
        }
        source = cause.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    fn generic(text: &str) -> Error {
        Error::Generic {
            store: "S3",
            source: text.to_owned().into(),
        }
    }

    fn kind(error: Error) -> Kind {
        match classify("get", "k", error) {
            Fault::Error(error) => error.kind(),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_may_pass_is_retried_and_what_cannot_is_not() {
        let non_2xx = "Server returned non-2xx status code: ";
        assert_eq!(
            kind(generic(&format!("{non_2xx}503 Service Unavailable: x"))),
            Kind::Retry
        );
        assert_eq!(
            kind(generic(&format!("{non_2xx}429 Too Many Requests: "))),
            Kind::Retry
        );
        assert_eq!(
            kind(generic(&format!("{non_2xx}400 Bad Request: "))),
            Kind::Denied
        );
        assert_eq!(kind(generic("connection reset")), Kind::Retry);
        assert!(matches!(
            classify(
                "get",
                "k",
                generic(&format!("{non_2xx}416 Range Not Satisfiable: "))
            ),
            Fault::OutOfRange
        ));
        assert!(matches!(
            classify(
                "put",
                "k",
                generic(&format!("{non_2xx}501 Not Implemented: "))
            ),
            Fault::NoConditions
        ));
    }
}
