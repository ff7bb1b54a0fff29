package dav

import (
	"encoding/json"
	"encoding/xml"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/net/webdav"

	"github.com/postern-dev/postern/proto"
)

// propertiesXattr is the extended attribute that keeps the properties of clients' own: a list of
// property as JSON, in the order of their names. It goes where the file goes, and counts among its attributes.
const propertiesXattr = "user.dav.properties"

const (
	// maxProperties bounds the properties of a file or directory.
	maxProperties = 256
	// maxPropertiesBytes bounds them together, as they are kept; extended attributes have a bound of their own.
	maxPropertiesBytes = 32 << 10
)

// property is one of a client's own ("dead") properties.
type property struct {
	Space string `json:"space,omitempty"`
	Local string `json:"local"`
	Lang  string `json:"lang,omitempty"`
	XML   string `json:"xml,omitempty"`
}

func (p property) name() xml.Name { return xml.Name{Space: p.Space, Local: p.Local} }

// parseProperties reads what an attribute has. What is not ours, such as a host may have
// written, counts as none.
func parseProperties(text []byte) []property {
	var all []property
	if len(text) > maxPropertiesBytes || json.Unmarshal(text, &all) != nil || len(all) > maxProperties {
		return nil
	}
	return slices.DeleteFunc(all, func(p property) bool { return !elementName.MatchString(p.Local) || !balanced(p.XML) })
}

// elementName is what an element may be called: the answer has it as it is.
var elementName = regexp.MustCompile(`^[\pL_][\pL\pN\pM._-]*$`)

// balanced tells whether a text is whole as the inside of an element: it must not end the answer
// that it becomes a part of.
func balanced(inner string) bool {
	d := xml.NewDecoder(strings.NewReader("<x>" + inner + "</x>"))
	depth := 0
	for {
		token, err := d.Token()
		if err != nil {
			return depth == 0 && d.InputOffset() == int64(len(inner)+len("<x></x>"))
		}
		switch token.(type) {
		case xml.StartElement:
			depth++
		case xml.EndElement:
			if depth--; depth == 0 && d.InputOffset() != int64(len(inner)+len("<x></x>")) {
				return false
			}
		case xml.Directive, xml.ProcInst:
			return false
		}
	}
}

// patchProperties applies patches to an attribute, all or none.
func patchProperties(old []byte, patches []webdav.Proppatch) ([]byte, error) {
	all := parseProperties(old)
	for _, patch := range patches {
		for _, set := range patch.Props {
			all = slices.DeleteFunc(all, func(p property) bool { return p.name() == set.XMLName })
			if !patch.Remove {
				all = append(all, property{Space: set.XMLName.Space, Local: set.XMLName.Local, Lang: set.Lang, XML: string(set.InnerXML)})
			}
		}
	}
	if len(all) == 0 {
		return nil, nil
	}
	slices.SortFunc(all, func(a, b property) int {
		return strings.Compare(a.Space+"\x00"+a.Local, b.Space+"\x00"+b.Local)
	})
	text, err := json.Marshal(all)
	if err == nil && (len(all) > maxProperties || len(text) > maxPropertiesBytes) {
		err = proto.Errorf(proto.CodeStorageFull, "properties of more than %d bytes, or more than %d of them", maxPropertiesBytes, maxProperties)
	}
	return text, err
}

var (
	_ webdav.DeadPropsHolder = (*reader)(nil)
	_ webdav.DeadPropsHolder = (*writer)(nil)
)

// DeadProps implements webdav.DeadPropsHolder.
func (i *fileInfo) DeadProps() (map[xml.Name]webdav.Property, error) {
	out := map[xml.Name]webdav.Property{}
	for _, p := range parseProperties(i.info.Node.GetXattrs()[propertiesXattr]) {
		out[p.name()] = webdav.Property{XMLName: p.name(), Lang: p.Lang, InnerXML: []byte(p.XML)}
	}
	return out, nil
}

// taken is the answer to patches of which all were taken.
func taken(patches []webdav.Proppatch) []webdav.Propstat {
	stat := webdav.Propstat{Status: http.StatusOK}
	for _, patch := range patches {
		for _, p := range patch.Props {
			stat.Props = append(stat.Props, webdav.Property{XMLName: p.XMLName})
		}
	}
	return []webdav.Propstat{stat}
}

// Patch implements webdav.DeadPropsHolder.
func (r *reader) Patch(patches []webdav.Proppatch) ([]webdav.Propstat, error) {
	q := requestOf(r.ctx)
	_, file := split(r.at)
	if r.workspace == "" {
		return nil, q.note(errTop)
	}
	clear(q.known)
	err := r.files.SetAttribute(r.ctx, q.caller, r.workspace, file, propertiesXattr, func(old []byte) ([]byte, error) {
		return patchProperties(old, patches)
	})
	if err != nil {
		return nil, q.pathError("proppatch", r.at, err)
	}
	return taken(patches), nil
}

// Patch implements webdav.DeadPropsHolder: the file gets its properties when it is there.
func (w *writer) Patch(patches []webdav.Proppatch) ([]webdav.Propstat, error) {
	w.patches = append(w.patches, patches...)
	return taken(patches), nil
}
