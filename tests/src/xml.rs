//! Whether a document is well-formed XML (1.0), as far as pictures use it: elements, attributes, text and the predefined entities.

/// An element, in the order of their ends.
#[derive(Debug, Default)]
pub struct Element {
    /// Its name.
    pub name: String,
    /// Its attributes, in order.
    pub attributes: Vec<(String, String)>,
    /// The text that is directly in it.
    pub text: String,
}

impl Element {
    /// An attribute that is a number.
    pub fn number(&self, name: &str) -> Option<f64> {
        let (_, value) = self.attributes.iter().find(|(attribute, _)| attribute == name)?;
        value.parse().ok()
    }
}

/// The elements of a document.
///
/// # Panics
/// It is not well-formed.
pub fn elements(document: &str) -> Vec<Element> {
    let (mut open, mut closed): (Vec<Element>, Vec<Element>) = (Vec::new(), Vec::new());
    let mut rest = document;
    while !rest.is_empty() {
        let (text, tag) = rest.split_at(rest.find('<').unwrap_or(rest.len()));
        let text = unescaped(text);
        match open.last_mut() {
            Some(element) => element.text += &text,
            None => assert!(text.trim().is_empty(), "text outside of the root: {text:?}"),
        }
        let Some(tag) = tag.strip_prefix('<') else { break };
        let (tag, after) = tag.split_once('>').unwrap_or_else(|| panic!("no >: {tag:?}"));
        rest = after;
        if let Some(name) = tag.strip_prefix('/') {
            let element = open.pop().unwrap_or_else(|| panic!("</{name}> closes nothing"));
            assert_eq!(element.name, name, "closed by another tag");
            closed.push(element);
            continue;
        }
        assert!(!open.is_empty() || closed.is_empty(), "a second root: <{tag}>");
        let (start, is_empty) = tag.strip_suffix('/').map_or((tag, false), |start| (start, true));
        let element = element(start);
        if is_empty { &mut closed } else { &mut open }.push(element);
    }
    assert!(open.is_empty() && !closed.is_empty(), "not closed: {open:?}");
    closed
}

/// `name attribute="value" ...`.
fn element(tag: &str) -> Element {
    let (name, mut rest) = tag.split_at(tag.find(char::is_whitespace).unwrap_or(tag.len()));
    let mut element = Element { name: name.to_owned(), ..Element::default() };
    assert!(is_name(name), "no name: <{tag}>");
    while !rest.trim_start().is_empty() {
        assert!(rest.starts_with(char::is_whitespace), "no space: <{tag}>");
        let (name, value) = rest.trim_start().split_once("=\"").expect("an attribute");
        let (value, after) = value.split_once('"').expect("a closing quote");
        assert!(is_name(name) && !value.contains('<'), "no attribute: <{tag}>");
        let is_new = element.attributes.iter().all(|(other, _)| other != name);
        assert!(is_new, "{name} is given twice: <{tag}>");
        element.attributes.push((name.to_owned(), unescaped(value)));
        rest = after;
    }
    element
}

fn is_name(text: &str) -> bool {
    text.starts_with(|first: char| first.is_ascii_alphabetic())
        && text.chars().all(|at| at.is_ascii_alphanumeric() || at == '-')
}

/// §2.2 has the characters that there are, §4.6 the entities.
fn unescaped(text: &str) -> String {
    let is_none =
        |at: char| (at < ' ' && !"\t\n\r".contains(at)) || matches!(at, '\u{fffe}' | '\u{ffff}');
    assert!(!text.contains(is_none), "a character that XML does not have: {text:?}");
    let mut parts = text.split('&');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (entity, after) = part.split_once(';').unwrap_or_else(|| panic!("&{part}"));
        plain += match entity {
            "amp" => "&",
            "lt" => "<",
            "gt" => ">",
            "quot" => "\"",
            "apos" => "'",
            other => panic!("&{other}; is no entity"),
        };
        plain += after;
    }
    plain
}
