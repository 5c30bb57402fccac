//! JSON as QEMU reads it: strings may be in single quotes, and a duplicate key in an object is an error.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

/// Reads one value.
///
/// # Errors
/// It is not valid JSON. The error has the position.
pub(super) fn parse(bytes: &[u8]) -> serde_json::Result<Value> {
    serde_json::from_slice(&in_double_quotes(bytes)).map(|Strict(value)| value)
}

/// Replaces single quotes around strings, which scripts for QEMU use, by double quotes.
fn in_double_quotes(bytes: &[u8]) -> Cow<'_, [u8]> {
    if !bytes.contains(&b'\'') {
        return bytes.into();
    }
    let mut text = Vec::with_capacity(bytes.len());
    let (mut quote, mut escaped) = (None, false);
    for &byte in bytes {
        match byte {
            _ if escaped => {
                escaped = false;
                if byte == b'\'' {
                    text.pop();
                }
                text.push(byte);
            }
            b'\\' => {
                escaped = quote.is_some();
                text.push(byte);
            }
            b'"' | b'\'' if quote.is_none_or(|quote| quote == byte) => {
                quote = quote.is_none().then_some(byte);
                text.push(b'"');
            }
            b'"' => text.extend_from_slice(b"\\\""),
            _ => text.push(byte),
        }
    }
    text.into()
}

/// A value without duplicate keys. Of two equal keys, readers of JSON disagree which one counts.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Reader).map(Self)
    }
}

struct Reader;

impl<'de> Visitor<'de> for Reader {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut array = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            array.push(item);
        }
        Ok(array.into())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some((key, Strict(value))) = members.next_entry::<String, _>()? {
            if object.insert(key, value).is_some() {
                return Err(A::Error::custom("duplicate key"));
            }
        }
        Ok(object.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn values_are_those_of_json() {
        let text = r#"{"a": [1, -1, 1.5, true, null, "\u00e9'\\\""], "b": {"a": {}}, "c": 18446744073709551615}"#;
        assert_eq!(parse(text.as_bytes()).unwrap(), serde_json::from_str::<Value>(text).unwrap());
    }

    #[test]
    fn single_quotes_are_as_good() {
        for (text, value) in [
            ("{'execute': 'stop'}", json!({"execute": "stop"})),
            (
                r#"['a"b', "a'b", 'it\'s', "it\'s", '\\', '\"', '']"#,
                json!(["a\"b", "a'b", "it's", "it's", "\\", "\"", ""]),
            ),
        ] {
            assert_eq!(parse(text.as_bytes()).unwrap(), value, "{text}");
        }
        for bad in ["'", "['a\"]", "[\"a']", "\\''"] {
            assert!(parse(bad.as_bytes()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_key_twice_is_an_error() {
        for text in [r#"{"a": 1, "a": 1}"#, r#"[{"b": {"a": 1, "c": 2, "\u0061": 3}}]"#] {
            assert!(
                parse(text.as_bytes()).unwrap_err().to_string().contains("duplicate key"),
                "{text}"
            );
        }
    }
}
